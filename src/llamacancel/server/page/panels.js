// Figures, slots and queue.

import { at, count, draw, make, say, seconds, some } from "./dom.js";
import { ENDS, mark } from "./lanes.js";

const SPARK_POINTS = 61;
const KINDS = [["queued", "waits"], ["prefill", "reads its prompt"], ["decode", "writes"], ["whole", "embeds"]];

/** Keep one element for each key, in order: `make(key)` a new one, `show(element, item)` what it says. */
function keep(list, items, keyOf, create, show) {
  const known = new Map([...list.children].map((element) => [element.dataset.key, element]));
  items.forEach((item, i) => {
    const key = String(keyOf(item));
    let element = known.get(key);
    known.delete(key);
    if (!element) {
      element = create(item);
      element.dataset.key = key;
    }
    if (list.children[i] !== element) list.insertBefore(element, list.children[i] ?? null);
    show(element, item);
  });
  for (const element of known.values()) element.remove();
}

/** The four figures on top. */
export function showTiles(state) {
  const { slots, queue, queue_limit: limit, cells, cells_used: used } = state.server;
  const now = state.now();
  say(at("busy"), count(slots.filter((slot) => slot.state !== "idle").length));
  say(at("busy-of"), ` of ${count(slots.length)}`);
  say(at("memory"), cells ? `memory: ${count(used ?? 0)} of ${count(cells)} positions` : "\u00a0");
  say(at("waiting"), count(queue.length));
  say(at("waiting-of"), ` of ${count(limit)}`);
  const oldest = Math.min(...queue.map((view) => view.submitted_at));
  say(at("oldest"), queue.length ? `the longest for ${wait(now - oldest)}` : "\u00a0");
  const rate = state.generated.rate(now);
  say(at("rate"), rate && rate < 10 ? rate.toFixed(1) : count(Math.round(rate)));
  const prompts = Math.round(state.prompted.rate(now));
  say(at("prompt-rate"), prompts ? `and ${count(prompts)} of prompts` : "\u00a0");
  spark(state.generated.history(now, SPARK_POINTS));
  if (state.median !== null) {
    say(at("median"), seconds(state.median));
    say(at("median-of"), " median");
    say(at("worst"), `worst ${seconds(state.worst.cancel_latency)}, of ${some(state.cancels, "cancel")}`);
  }
  say(at("seen"), state.finished ? `${some(state.finished, "request")} seen to end` : "");
}

const wait = (value) => (value < 9.95 ? `${Math.max(value, 0).toFixed(1)} s` : seconds(value));

function spark(rates) {
  const svg = at("spark");
  if (!svg.firstChild) {
    svg.setAttribute("viewBox", `0 0 ${SPARK_POINTS - 1} 24`);
    svg.setAttribute("preserveAspectRatio", "none");
    svg.append(draw("path", { class: "area" }), draw("path", { class: "line" }));
  }
  const top = Math.max(...rates, 1e-9);
  const line = rates.map((rate, i) => `${i} ${(23 - (21 * rate) / top).toFixed(2)}`).join("L");
  svg.children[0].setAttribute("d", `M0 24L${line}L${SPARK_POINTS - 1} 24Z`);
  svg.children[1].setAttribute("d", `M${line}`);
}

/** Colours, marks, and how many requests ended so. */
export function showLegend(state) {
  const ends = Object.keys(ENDS).filter((end) => state.ends[end] || ["stop", "length", "hung-up", "cancelled"].includes(end));
  const other = Object.keys(state.ends).filter((end) => !ENDS[end]);
  const kinds = KINDS.filter(([kind]) => kind !== "whole" || [...state.views.values()].some((view) => view.kind === "embedding"));
  const items = [...kinds.map(([kind, word]) => ({ kind, word })), ...[...ends, ...other].map((end) => ({ end }))];
  keep(
    at("legend"),
    items,
    (item) => item.kind ?? `end ${item.end}`,
    (item) => {
      const sample = item.kind ? make("i", { class: `bar ${item.kind}`, "aria-hidden": "true" }) : mark(item.end);
      const parts = [sample, make("span", {}, item.word ?? ENDS[item.end]?.word ?? item.end)];
      return make("li", item.kind ? {} : { "data-end": item.end }, ...parts, ...(item.end ? [make("b")] : []));
    },
    (element, item) => {
      if (item.end) say(element.lastChild, count(state.ends[item.end] ?? 0));
    },
  );
}

/** The slots: what runs in each, and the positions that it holds. */
export function showSlots(state) {
  const { slots, active, cells } = state.server;
  const running = new Map(active.map((view) => [view.id, view]));
  const most = Math.max(...slots.map((slot) => slot.n_past), 1);
  keep(
    at("slots"),
    slots,
    (slot) => slot.id,
    (slot) =>
      make(
        "li",
        { class: "slot" },
        make("span", { class: "number" }, String(slot.id)),
        make("div", { class: "work" }, make("b"), make("bdi", { class: "id" })),
        make("span", { class: "held" }),
        make("div", { class: "gauge" }, make("i")),
      ),
    (element, slot) => {
      const view = slot.request_id === null ? null : running.get(slot.request_id);
      element.dataset.state = slot.state;
      const [, work, held, gauge] = element.children;
      const words = { idle: "idle", prefill: "reads", decode: "writes" };
      say(work.children[0], view?.waits_for_memory ? "waits for memory" : words[slot.state]);
      say(work.children[1], slot.request_id ?? "");
      work.children[1].title = slot.request_id ?? "";
      const positions = some(slot.n_past, "position");
      say(held, view && slot.state === "prefill" ? `${count(view.prompt_done)} of ${count(view.prompt_tokens)}` : positions);
      const share = slot.state === "prefill" && view?.prompt_tokens ? view.prompt_done / view.prompt_tokens : slot.n_past / (cells ?? most);
      gauge.firstChild.style.transform = `scaleX(${Math.min(share, 1).toFixed(4)})`;
    },
  );
}

/** Who waits, the first in line first. */
export function showQueue(state, onCancel) {
  const { queue } = state.server;
  const now = state.now();
  const shown = queue.slice(0, 20);
  at("queue-hint").hidden = queue.length > 0 && queue.length === shown.length;
  say(at("queue-hint"), queue.length ? `and ${count(queue.length - shown.length)} more` : "Nobody waits.");
  keep(
    at("queue"),
    shown,
    (view) => `${view.submitted_at} ${view.id}`,
    (view) => {
      const button = make("button", { type: "button", class: "cancel", "aria-label": `Cancel request ${view.id}` }, "Cancel");
      button.addEventListener("click", () => {
        if (button.getAttribute("aria-disabled")) return;
        button.setAttribute("aria-disabled", "true");
        say(button, "Cancelling…");
        onCancel(view).then(({ ok }) => {
          if (ok) return;
          button.removeAttribute("aria-disabled");
          say(button, "Cancel");
        });
      });
      return make(
        "li",
        { class: "waiter" },
        make("span", { class: "number" }),
        make("div", { class: "work" }, make("bdi", { class: "id", title: view.id }, view.id), make("span", { class: "about" })),
        make("span", { class: "held" }),
        button,
      );
    },
    (element, view) => {
      const [number, work, held] = element.children;
      say(number, String(queue.indexOf(view) + 1));
      const about = [some(view.prompt_tokens, "token"), view.priority ? `priority ${view.priority}` : "", view.waits_for_memory ? "waits for memory" : ""];
      say(work.children[1], about.filter(Boolean).join(" · "));
      say(held, wait(now - view.submitted_at));
      element.lastChild.hidden = !view.yours;
    },
  );
}
