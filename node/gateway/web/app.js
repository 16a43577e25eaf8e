import { call, stream, token, Refused } from "./api.js";
import * as view from "./view.js";

const $ = (id) => document.getElementById(id);
const every = 2000;      // ms between two looks
const keepEvents = 200;
let run = null;          // the AbortController of what is being shown

function live(text, c) {
  $("live").textContent = text;
  $("live").className = c;
}

function ask(why = "") {
  run?.abort();
  run = null;
  token.clear();
  $("refused").textContent = why;
  $("view").hidden = true;
  $("door").hidden = false;
  $("token").value = "";
  $("token").focus();
  live("", "");
}

const pause = (ms, signal) => new Promise((done) => {
  const t = setTimeout(done, ms);
  signal.addEventListener("abort", () => { clearTimeout(t); done(); }, { once: true });
});

async function look(signal) {
  const [status, nodes, ps, apps] = await Promise.all(["Status", "Nodes", "Ps", "Apps"].map((m) => call(m, {}, signal)));
  $("cluster").textContent = `${status.cluster} · answered by ${status.node} ${status.version}`;
  $("summary").replaceChildren(...view.summary(status));
  $("nodes").replaceChildren(view.nodes(nodes.nodes));
  $("ring").replaceChildren(view.ring(nodes.nodes, ps.instances));
  $("instances").replaceChildren(view.instances(ps.instances));
  $("apps").replaceChildren(view.apps(apps.apps));
}

// forever repeats what may fail until the token is refused or the view is closed.
async function forever(work, signal) {
  while (!signal.aborted) {
    try {
      await work(signal);
    } catch (e) {
      if (signal.aborted) return;
      if (e instanceof Refused) return ask(e.message);
      live("no answer: " + e.message, "bad");
    }
    await pause(every, signal);
  }
}

async function watch(signal) {
  $("events").replaceChildren();
  for await (const e of stream("Events", { channel: "/", follow: true, limit: 50 }, signal)) {
    $("events").prepend(view.event(e));
    while ($("events").childElementCount > keepEvents) $("events").lastChild.remove();
  }
}

function open() {
  run?.abort();
  run = new AbortController();
  $("door").hidden = true;
  $("view").hidden = false;
  forever(async (signal) => { await look(signal); live("live", "good"); }, run.signal);
  forever(watch, run.signal);
}

$("door").addEventListener("submit", (e) => {
  e.preventDefault();
  token.set($("token").value.trim());
  open();
});

$("theme").addEventListener("click", () => {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = document.documentElement.dataset.theme || (dark ? "dark" : "light");
  document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
});

token.get() ? open() : ask();
