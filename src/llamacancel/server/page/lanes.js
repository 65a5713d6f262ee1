// Requests as lanes over time: the newest on top, now at the right edge.

import { at, count, draw, make, say, seconds, some } from "./dom.js";
import { ending, keyOf } from "./state.js";

const MOST = 60; // rows; what runs or waits is shown first
const FRAME = 33; // milliseconds between two pictures
const CALM_FRAME = 1000; // the same where somebody prefers less motion
const STEPS = { 10: 2, 30: 5, 60: 10, 120: 20 };

/** How a request may end: its word, and its mark, as in the pictures of the conformance runner. */
export const ENDS = {
  stop: { word: "finished", mark: "dot" },
  length: { word: "reached its length", mark: "ring" },
  "hung-up": { word: "hung up", mark: "cross" },
  cancelled: { word: "cancelled", mark: "diamond" },
  deadline: { word: "deadline", mark: "bar" },
  shutdown: { word: "shutdown", mark: "square" },
  error: { word: "error", mark: "triangle" },
};

const SHAPES = {
  cross: "M-4.5-4.5 4.5 4.5M4.5-4.5-4.5 4.5",
  bar: "M-2.2-6V6M2.2-6V6",
  diamond: "M0-6 6 0 0 6-6 0Z",
  square: "M-4.5-4.5H4.5V4.5H-4.5Z",
  triangle: "M0-5.5 5.8 4.5H-5.8Z",
};

/** A mark for an end, 16 pixels square. */
export function mark(end) {
  const { mark: shape } = ENDS[end] ?? ENDS.error;
  const svg = draw("svg", { class: `mark is-${shape}`, viewBox: "-8 -8 16 16", width: 16, height: 16, "aria-hidden": "true" });
  if (shape === "dot" || shape === "ring") svg.append(draw("circle", { r: 5 }));
  else svg.append(draw("path", { d: SHAPES[shape], class: "halo" }), draw("path", { d: SHAPES[shape] }));
  return svg;
}

/** The stretches of a request's life: [kind, start, end], the end null while it lasts. */
export function spans(view) {
  const found = [];
  const add = (kind, start, end) => {
    if (start !== null && (end === null || end > start)) found.push([kind, start, end]);
  };
  add("queued", view.submitted_at, view.started_at ?? view.finished_at);
  if (view.kind === "embedding") {
    add("whole", view.started_at, view.finished_at);
  } else {
    add("prefill", view.started_at, view.first_token_at ?? view.finished_at);
    add("decode", view.first_token_at, view.finished_at);
  }
  if (view.cancel_latency !== null) add("rest", view.finished_at - view.cancel_latency, view.finished_at);
  return found;
}

/** The lanes.
 *
 * `onCancel(view)` is called by a button. It answers { ok, latency } or { ok: false, words }.
 */
export class Lanes {
  constructor(state, onCancel) {
    this.state = state;
    this.onCancel = onCancel;
    this.rows = new Map();
    this.window = 60;
    this.paused = null; // the time at which it was
    this.frozen = null; // what was shown then
    this.width = 1;
    this.ticks = [];
    this.calm = matchMedia("(prefers-reduced-motion: reduce)");
    this.drawn = 0;
    this.visible = true;
    new ResizeObserver(() => requestAnimationFrame(() => this.measure())).observe(at("chart"));
    new IntersectionObserver(([entry]) => { this.visible = entry.isIntersecting; }).observe(at("chart"));
    const frame = (time) => {
      const rest = this.calm.matches || !this.rows.size ? CALM_FRAME : FRAME;
      if (this.visible && time - this.drawn >= rest - 8) {
        this.drawn = time;
        this.move();
      }
      requestAnimationFrame(frame);
    };
    requestAnimationFrame(frame);
  }

  /** The right edge, in the server's Unix seconds. */
  edge() {
    return this.paused ?? this.state.now();
  }

  show(windowSeconds) {
    this.window = windowSeconds;
    this.render();
  }

  pause(paused) {
    this.paused = paused ? this.state.now() : null;
    this.frozen = paused ? new Map(this.state.views) : null;
    this.render();
  }

  measure() {
    const scale = at("scale");
    const width = Math.max(scale.clientWidth, 1);
    if (width === this.width) return;
    this.width = width;
    at("ticks").style.left = `${scale.offsetLeft}px`;
    at("ticks").style.width = `${this.width}px`;
    this.render();
  }

  /** Bring the rows up to what is known. */
  render() {
    const edge = this.edge();
    const from = edge - this.window;
    const known = [...(this.frozen ?? this.state.views).values()];
    const seen = known.filter((view) => view.state !== "finished" || view.finished_at > from);
    seen.sort((a, b) => b.submitted_at - a.submitted_at);
    const shown = choose(seen);
    const list = at("lanes");
    const keys = new Set(shown.map(keyOf));
    for (const [key, row] of this.rows) {
      if (!keys.has(key)) {
        row.element.remove();
        this.rows.delete(key);
      }
    }
    shown.forEach((view, i) => {
      const key = keyOf(view);
      let row = this.rows.get(key);
      if (!row) {
        row = new Row((current) => this.onCancel(current));
        this.rows.set(key, row);
      }
      if (list.children[i] !== row.element) list.insertBefore(row.element, list.children[i] ?? null);
      row.render(view);
    });
    const hidden = seen.length - shown.length;
    at("more").hidden = !hidden;
    say(at("more"), hidden ? `and ${count(hidden)} more in this time` : "");
    at("chart").hidden = !known.length;
    this.move();
    return shown.length;
  }

  /** Move everything to where it is now. */
  move() {
    const edge = this.edge();
    const perSecond = this.width / this.window;
    for (const row of this.rows.values()) row.move(edge, this.window, perSecond);
    this.moveTicks(edge, perSecond);
  }

  moveTicks(edge, perSecond) {
    const step = STEPS[this.window] * (this.width < 420 ? 2 : 1);
    const box = at("ticks");
    const first = Math.ceil((edge - this.window) / step) * step;
    const needed = Math.floor((edge - first) / step) + 1;
    while (this.ticks.length < needed) {
      const label = make("span");
      const line = make("i", {}, label);
      this.ticks.push({ line, label });
      box.append(line);
    }
    while (this.ticks.length > needed) this.ticks.pop().line.remove();
    this.ticks.forEach(({ line, label }, i) => {
      const time = first + i * step;
      line.style.transform = `translateX(${((time - edge + this.window) * perSecond).toFixed(2)}px)`;
      say(label, new Date(time * 1e3).toLocaleTimeString("en-GB"));
    });
  }
}

function choose(seen) {
  if (seen.length <= MOST) return seen;
  const open = seen.filter((view) => view.state !== "finished").slice(-MOST);
  const chosen = new Set([...open, ...seen.filter((view) => view.state === "finished").slice(0, MOST - open.length)]);
  return seen.filter((view) => chosen.has(view));
}

/** One request. */
class Row {
  constructor(onCancel) {
    this.id = make("bdi", { class: "id" });
    this.about = make("span", { class: "about" });
    this.layer = make("div", { class: "layer" });
    this.track = make("div", { class: "track", role: "img" }, this.layer);
    this.what = make("span", { class: "what" });
    this.button = make("button", { type: "button", class: "cancel" }, "Cancel");
    this.fate = make("div", { class: "fate" }, this.what, this.button);
    this.element = make("li", { class: "lane", tabindex: -1 }, make("div", { class: "who" }, this.id, this.about), this.track, this.fate);
    this.bars = new Map();
    this.asked = null;
    this.button.addEventListener("click", () => this.cancel(onCancel));
  }

  async cancel(onCancel) {
    if (this.asked) return;
    this.asked = "asked";
    this.button.setAttribute("aria-disabled", "true");
    say(this.button, "Cancelling…");
    const answer = await onCancel(this.view);
    if (answer.ok || this.view.state === "finished") return; // the stream tells the rest
    this.asked = null;
    this.button.removeAttribute("aria-disabled");
    say(this.button, "Cancel");
    this.button.title = answer.words;
  }

  render(view) {
    this.view = view;
    const end = view.state === "finished" ? ending(view) : null;
    this.element.dataset.state = view.state;
    if (end) this.element.dataset.end = end;
    say(this.id, view.id);
    this.id.title = view.id;
    say(this.about, about(view));
    for (const [kind, start, stop] of spans(view)) this.bar(kind, start, stop);
    if (end && !this.mark) {
      this.mark = make("span", { class: "end" }, mark(end));
      this.layer.append(this.mark);
    }
    this.tell(view, end);
    this.track.setAttribute("aria-label", inWords(view, end));
  }

  bar(kind, start, stop) {
    let bar = this.bars.get(kind);
    if (!bar) {
      bar = { element: make("i", { class: `bar ${kind}` }) };
      this.bars.set(kind, bar);
      this.layer.append(bar.element);
    }
    bar.start = start;
    bar.stop = stop;
    bar.element.classList.toggle("open", stop === null);
  }

  tell(view, end) {
    if (!end) {
      say(this.what, doing(view));
      this.button.hidden = !view.yours;
      this.button.setAttribute("aria-label", `Cancel request ${view.id}`);
      return;
    }
    if (this.told) return;
    this.told = true;
    const held = document.activeElement === this.button;
    this.button.remove();
    if (held) this.element.focus({ preventScroll: true });
    const parts = [mark(end), make("b", {}, ENDS[end]?.word ?? end)];
    if (view.cancel_latency !== null) parts.push(make("span", { class: "latency" }, seconds(view.cancel_latency)));
    const why = because(view, end);
    if (why) {
      const reason = make("bdi", { class: "why" }, why);
      reason.title = why;
      parts.push(reason);
    }
    this.what.replaceChildren(...parts);
  }

  move(edge, span, perSecond) {
    const from = edge - span;
    for (const { element, start, stop } of this.bars.values()) {
      const x0 = Math.max(start - from, -1) * perSecond;
      const x1 = Math.min((stop ?? edge) - from, span) * perSecond;
      element.style.transform = `translateX(${x0.toFixed(2)}px)`;
      element.style.width = `${Math.max(x1 - x0, 2).toFixed(2)}px`;
      element.hidden = x1 < 0;
    }
    if (this.mark) {
      const moment = this.view.finished_at - (this.view.cancel_latency ?? 0);
      this.mark.style.transform = `translateX(${(Math.min(moment - from, span) * perSecond - 8).toFixed(2)}px)`;
    }
  }
}

function about(view) {
  const parts = [view.kind === "embedding" ? "embedding" : null, view.slot === null ? null : `slot ${view.slot}`];
  parts.push(some(view.prompt_tokens, "token").replace("token", "prompt token"));
  if (view.cached_tokens) parts.push(`${count(view.cached_tokens)} kept`);
  return parts.filter(Boolean).join(" · ");
}

function doing(view) {
  if (view.waits_for_memory) return "waits for memory";
  if (view.state === "queued") return "waits";
  if (view.state === "prefill" && view.prompt_tokens) {
    return `reads its prompt, ${Math.floor((100 * view.prompt_done) / view.prompt_tokens)} %`;
  }
  return `writes, ${some(view.completion_tokens, "token")}`;
}

function because(view, end) {
  if (end === "error" || end === "cancelled") return view.reason.replace(/^cancelled /, "");
  if (view.kind === "generation" && view.completion_tokens) return some(view.completion_tokens, "token");
  return "";
}

function inWords(view, end) {
  const words = { queued: "waited", prefill: "prompt", decode: "answer", whole: "embedding", rest: "slot free after" };
  const parts = spans(view).map(([kind, start, stop]) => (stop === null ? doing(view) : `${words[kind]} ${seconds(stop - start)}`));
  if (end) parts.push(ENDS[end]?.word ?? end);
  return parts.join(", ");
}
