// What the page knows: requests, slots, the server's clock, and what has been counted so far.

const KEPT = 2000; // requests and latencies that are remembered; more than the engine does
const RATE_SECONDS = 3;
const SPARK_SECONDS = 60;

export class State {
  constructor() {
    this.views = new Map(); // all that is known, by id and time: two requests may have one name, one after the other
    this.server = null; // the last event
    this.finished = 0;
    this.ends = {}; // how many of them ended how
    this.cancels = 0;
    this.latencies = []; // of the last cancels, in seconds
    this.worst = null; // the request whose cancel took longest
    this.offset = null; // the server's clock minus this one
    this.heard = 0;
    this.generated = new Meter();
    this.prompted = new Meter();
  }

  /** The server's time, in Unix seconds. */
  now() {
    return performance.now() / 1e3 + (this.offset ?? 0);
  }

  /** Take in an event. Returns the requests that have ended with it, or none where it tells the past. */
  take(server) {
    this.keepTime(server.now);
    this.server = server;
    const counting = !server.complete;
    const ended = server.recent.filter((view) => this.update(view, counting));
    const present = new Set();
    for (const view of [...server.active, ...server.queue]) {
      present.add(keyOf(view));
      this.update(view, counting);
    }
    for (const [key, view] of this.views) {
      if (view.state !== "finished" && !present.has(key)) this.views.delete(key); // it ended while nobody was told
    }
    for (const meter of [this.generated, this.prompted]) meter.mark(this.now(), counting);
    return counting ? ended : [];
  }

  keepTime(told) {
    const here = performance.now() / 1e3;
    const sample = told - here;
    // What took least time to come is nearest to the truth. It is forgotten slowly, for clocks that drift.
    const faded = this.offset === null ? -Infinity : this.offset - 0.002 * (here - this.heard);
    this.offset = Math.abs(sample - faded) > 2 ? sample : Math.max(sample, faded);
    this.heard = here;
  }

  /** Take in a request. Returns whether it has ended with this. */
  update(view, counting) {
    const key = keyOf(view);
    const before = this.views.get(key);
    if (before?.state === "finished") return false;
    this.views.set(key, view);
    if (counting) {
      this.generated.add(view.completion_tokens - (before?.completion_tokens ?? 0));
      this.prompted.add(view.prompt_done - Math.max(before?.prompt_done ?? 0, view.cached_tokens));
    }
    if (view.state !== "finished") return false;
    this.count(view);
    return true;
  }

  count(view) {
    const end = ending(view);
    this.finished += 1;
    this.ends[end] = (this.ends[end] ?? 0) + 1;
    if (view.cancel_latency !== null) {
      this.cancels += 1;
      this.latencies.push(view.cancel_latency);
      if (this.latencies.length > KEPT) this.latencies.shift();
      if (this.worst === null || view.cancel_latency > this.worst.cancel_latency) this.worst = view;
    }
    if (this.views.size <= KEPT) return;
    for (const [key, old] of this.views) {
      if (this.views.size <= KEPT) break;
      if (old.state === "finished") this.views.delete(key);
    }
  }

  /** Of the last cancels' latencies, or null. */
  get median() {
    const sorted = this.latencies.toSorted((a, b) => a - b);
    const n = sorted.length;
    return n ? (sorted[(n - 1) >> 1] + sorted[n >> 1]) / 2 : null;
  }
}

/** What tells a request from all others, also from an earlier one of the same name. */
export const keyOf = (view) => `${view.submitted_at} ${view.id}`;

/** How a request ended, as the page tells them apart. */
export function ending(view) {
  return view.finish_reason === "cancelled" && view.reason === "the client hung up" ? "hung-up" : view.finish_reason;
}

/** Counts tokens, and knows how many came lately. */
class Meter {
  constructor() {
    this.total = 0;
    this.marks = []; // [time, total], one for each event
  }

  add(n) {
    this.total += Math.max(n, 0);
  }

  /** Note the total of a moment; not `going`: nothing is known of the time before. */
  mark(now, going) {
    if (!going) this.marks.length = 0;
    this.marks.push([now, this.total]);
    while (this.marks.length > 2 && this.marks[1][0] < now - SPARK_SECONDS - RATE_SECONDS) this.marks.shift();
  }

  /** The total at a time. Between two events tokens came evenly; where nothing was told for long, at its end. */
  at(time) {
    const next = this.marks.findIndex(([t]) => t > time);
    if (next === 0) return this.marks[0][1];
    if (next < 0) return this.total;
    const [t0, n0] = this.marks[next - 1];
    const [t1, n1] = this.marks[next];
    const begun = Math.max(t0, t1 - 0.5);
    return time <= begun ? n0 : n0 + ((n1 - n0) * (time - begun)) / (t1 - begun);
  }

  /** Tokens per second, over the seconds before a time. */
  rate(time) {
    const first = this.marks.length ? this.marks[0][0] : time;
    const span = Math.min(RATE_SECONDS, time - first);
    if (span < 0.3) return 0;
    return (this.at(time) - this.at(time - span)) / span;
  }

  /** Rates over the last minute, oldest first. */
  history(now, points) {
    const step = SPARK_SECONDS / (points - 1);
    return Array.from({ length: points }, (_, i) => this.rate(now - (points - 1 - i) * step));
  }
}
