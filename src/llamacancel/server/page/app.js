// The live page: what the engine does, and a button that stops one request of it.

import { at, make, say, seconds } from "./dom.js";
import { Feed, cancel, key } from "./feed.js";
import { ENDS, Lanes } from "./lanes.js";
import { showLegend, showQueue, showSlots, showTiles } from "./panels.js";
import { State, ending } from "./state.js";

const NEWS_EVERY = 2000;

const state = new State();
const lanes = new Lanes(state, stop);
let demandsKey = key.value !== "";
let again = 0; // when the next attempt to connect is due

const feed = new Feed({
  onState(server) {
    for (const view of state.take(server)) tell(view);
    show();
  },
  onConnection(name, wait) {
    document.body.dataset.connection = name === "connecting" && state.server ? "lost" : name;
    again = name === "lost" ? performance.now() / 1e3 + wait : 0;
    at("key-form").hidden = name !== "key";
    at("content").hidden = name === "key";
    at("retry").hidden = name !== "lost";
    if (name === "key") askForKey();
    at("links").hidden = demandsKey; // a link sends none
    showConnection(name);
  },
});

async function stop(view) {
  const answer = await cancel(view.id);
  if (!answer.ok) news(`Request ${view.id} was not cancelled: ${answer.words}.`);
  return answer;
}

function show() {
  if (!state.server) return;
  say(at("model"), state.server.model);
  document.title = `${state.server.model} · llamacancel`;
  showTiles(state);
  showLegend(state);
  showSlots(state);
  showQueue(state, stop);
  showEmpty(lanes.render());
}

function showEmpty(rows) {
  at("empty").hidden = rows > 0;
  at("legend").hidden = state.views.size === 0;
  if (rows) return;
  const never = state.views.size === 0;
  say(at("empty-title"), never ? "No request yet" : `None in the last ${lanes.window} seconds`);
  const base = new URL(".", document.baseURI).href;
  const body = JSON.stringify({ prompt: "Once upon a time", max_tokens: 500, stream: true });
  const parts = [`curl -N ${base}v1/completions`, '-H "Content-Type: application/json"', `-d '${body}'`];
  if (demandsKey) parts.splice(1, 0, '-H "Authorization: Bearer $LLAMACANCEL_API_KEY"');
  say(at("curl"), parts.join(" \\\n  "));
}

// -- the connection

function showConnection(name) {
  if (state.server?.closing && name === "lost") return say(at("connection"), "the server has shut down");
  if (name === "live") return say(at("connection"), state.server?.closing ? "shutting down" : "live");
  if (name === "key") return say(at("connection"), "key needed");
  if (name === "connecting") return say(at("connection"), state.server ? "connection lost; trying again…" : "connecting…");
  const left = Math.ceil(Math.max(again - performance.now() / 1e3, 0));
  say(at("connection"), left > 1 ? `connection lost; again in ${left} s` : "connection lost; trying again…");
}

function askForKey() {
  say(at("key-words"), key.value ? "The server does not take that key. Try another one." : at("key-words").textContent);
  demandsKey = true;
  at("key").value = "";
  at("key").focus();
}

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.keep(at("key").value.trim());
  feed.connect();
});
at("retry").addEventListener("click", () => feed.hurry());
addEventListener("online", () => feed.hurry());
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) feed.hurry();
});

// -- controls

at("windows").addEventListener("change", (event) => {
  lanes.show(Number(event.target.value));
  show();
});
at("pause").addEventListener("click", () => {
  const paused = lanes.paused === null;
  lanes.pause(paused);
  at("pause").setAttribute("aria-pressed", String(paused));
  say(at("pause"), paused ? "Resume" : "Pause");
  at("chart").classList.toggle("paused", paused);
});
at("copy").addEventListener("click", async () => {
  const code = at("curl");
  try {
    await navigator.clipboard.writeText(code.textContent);
  } catch {
    getSelection().selectAllChildren(code); // clipboards are for secure pages; this one may be on http
    document.execCommand("copy");
  }
  say(at("copy"), "Copied");
  setTimeout(() => say(at("copy"), "Copy"), 1500);
});

// -- what screen readers are told: a sentence now and then, not each token

const untold = [];

function tell(view) {
  const end = ending(view);
  const word = ENDS[end]?.word ?? end;
  untold.push(view.cancel_latency === null ? word : `${view.id}: ${word}, slot free after ${seconds(view.cancel_latency)}`);
}

function news(text) {
  at("news").append(make("p", {}, text));
  while (at("news").children.length > 5) at("news").firstChild.remove();
}

setInterval(() => {
  const told = untold.splice(0);
  if (told.length > 3) news(`${told.length} requests ended.`);
  else for (const text of told) news(`Request ${text}.`);
}, NEWS_EVERY);

// -- what changes by itself: the age of things, and what leaves the picture

setInterval(() => {
  if (document.body.dataset.connection === "lost" && again) showConnection("lost");
  if (document.hidden || !state.server) return;
  showTiles(state);
  showQueue(state, stop);
  if (lanes.paused === null) showEmpty(lanes.render());
}, 1000);

feed.connect();
