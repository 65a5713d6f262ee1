// The stream of the server's state. EventSource can send no key, so this reads it with fetch.

const SILENCE = 40_000; // milliseconds without a byte after which a stream counts as dead; the server pings every 15 s
const SHORTEST = 500;
const LONGEST = 10_000;
const STORED = "llamacancel-api-key";

/** The key of this tab, kept until the tab is closed. */
export const key = {
  value: recall(),
  keep(value) {
    this.value = value;
    try {
      if (value) sessionStorage.setItem(STORED, value);
      else sessionStorage.removeItem(STORED);
    } catch {
      // without storage it lasts until the next reload
    }
  },
  get headers() {
    return this.value ? { Authorization: `Bearer ${this.value}` } : {};
  },
};

function recall() {
  const given = new URLSearchParams(location.hash.slice(1)).get("key"); // what the server printed, for who started it
  if (given) history.replaceState(null, "", location.pathname + location.search);
  try {
    if (given) sessionStorage.setItem(STORED, given);
    return sessionStorage.getItem(STORED) ?? "";
  } catch {
    return given ?? "";
  }
}

/**
 * Reads the stream for ever, and connects again when it is lost.
 *
 * `onState(state)` gets each event; `onConnection(name, seconds)` is told "connecting", "live", "lost" with the seconds
 * until the next attempt, or "key" when the server wants one (`connect()` goes on from there).
 */
export class Feed {
  constructor({ onState, onConnection }) {
    this.onState = onState;
    this.onConnection = onConnection;
    this.wait = SHORTEST;
    this.timer = null;
    this.running = null;
  }

  /** Connect now, unless that is so or under way. */
  connect() {
    if (this.running) return;
    clearTimeout(this.timer);
    this.timer = null;
    this.running = this.read().finally(() => {
      this.running = null;
      this.next();
    });
  }

  /** Connect now if the stream is lost. */
  hurry() {
    if (this.timer !== null) {
      this.wait = SHORTEST;
      this.connect();
    }
  }

  async read() {
    this.then = "lost";
    this.onConnection("connecting");
    const stop = new AbortController();
    let watch = setTimeout(() => stop.abort(), SILENCE);
    try {
      const response = await fetch(document.body.dataset.events, { headers: key.headers, cache: "no-store", signal: stop.signal });
      if (response.status === 401 || response.status === 403) {
        this.then = "key";
        await response.body?.cancel();
        return;
      }
      if (!response.ok || !response.body) throw new Error(`the server answered ${response.status}`);
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      let heard = false;
      for (;;) {
        const { done, value } = await reader.read();
        if (done) break;
        clearTimeout(watch);
        watch = setTimeout(() => stop.abort(), SILENCE);
        const events = (rest + value).split("\n\n");
        rest = events.pop();
        for (const event of events) {
          const data = event.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5));
          if (!data.length) continue;
          const state = JSON.parse(data.join("\n"));
          if (!heard) {
            heard = true;
            this.wait = SHORTEST;
            this.onConnection("live");
          }
          this.onState(state);
          if (state.closing) this.then = "lost";
          else this.then = "again"; // a stream that ends in good order has reached its age
        }
      }
    } catch {
      this.then = "lost"; // refused, cut, silent for too long, or no stream of this server
    } finally {
      clearTimeout(watch);
    }
  }

  next() {
    if (this.then === "key") return this.onConnection("key");
    if (this.then === "again") return this.connect();
    const wait = this.wait * (0.8 + 0.4 * Math.random());
    this.wait = Math.min(this.wait * 2, LONGEST);
    this.onConnection("lost", wait / 1e3);
    this.timer = setTimeout(() => {
      this.timer = null;
      this.connect();
    }, wait);
  }
}

/** Cancel a request. Returns what became of it: { ok, latency } or { ok: false, words }. */
export async function cancel(id) {
  try {
    const response = await fetch(`v1/requests/${encodeURIComponent(id)}`, { method: "DELETE", headers: key.headers });
    const body = await response.json().catch(() => ({}));
    if (response.ok) return { ok: true, latency: body.cancel_latency ?? null };
    return { ok: false, words: response.status === 404 ? "it had ended" : (body.error?.message ?? `${response.status}`) };
  } catch {
    return { ok: false, words: "the server cannot be reached" };
  }
}
