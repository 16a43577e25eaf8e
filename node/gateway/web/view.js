// What the dashboard shows. Everything is set as text, never as markup: names and messages come from components.

export function el(tag, attrs = {}, ...children) {
  const node = document.createElement(tag);
  for (const [k, v] of Object.entries(attrs)) node.setAttribute(k, v);
  node.append(...children);
  return node;
}

function svg(tag, attrs = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [k, v] of Object.entries(attrs)) node.setAttribute(k, v);
  node.append(...children);
  return node;
}

const classes = {
  good: ["alive", "running", "ready"],
  bad: ["dead", "failed", "refused"],
  dim: ["left", "stopped"],
};

export function stateClass(state) {
  for (const [c, states] of Object.entries(classes)) if (states.includes(state)) return c;
  return "warn";
}

const state = (s, why) => el("span", { class: stateClass(s), title: why || "" }, s || "–");

export function ms(v) {
  if (v === null || v === undefined) return "–";
  if (v < 10) return v.toFixed(v < 1 ? 2 : 1) + " ms";
  return v < 10000 ? Math.round(v) + " ms" : age(v);
}

export function age(v) {
  if (v === null || v === undefined) return "–";
  const s = Math.floor(v / 1000);
  if (s < 60) return s + "s";
  if (s < 3600) return Math.floor(s / 60) + "m " + (s % 60) + "s";
  if (s < 86400) return Math.floor(s / 3600) + "h " + Math.floor((s % 3600) / 60) + "m";
  return Math.floor(s / 86400) + "d " + Math.floor((s % 86400) / 3600) + "h";
}

const list = (v) => (v && v.length ? v.join(" ") : "–");

function table(heads, rows, none) {
  if (!rows.length) return el("p", { class: "dim" }, none);
  return el("table", {},
    el("thead", {}, el("tr", {}, ...heads.map((h) => el("th", { scope: "col" }, h)))),
    el("tbody", {}, ...rows.map((r) => el("tr", {}, ...r.map((c) => el("td", {}, c instanceof Node ? c : String(c ?? "–") || "–"))))));
}

export function summary(s) {
  const item = (value, label, c = "") => el("div", {}, el("b", { class: c }, String(value)), el("span", {}, label));
  const n = s.nodes || {}, k = s.components || {}, a = s.arbiter || {};
  const lost = (n.suspect || 0) + (n.dead || 0) + (n.quarantined || 0);
  const out = [
    item(n.alive || 0, "nodes alive", "good"),
    item(lost, "suspect, dead or quarantined", lost ? "bad" : ""),
    item(k.started || 0, "instances started", "good"),
    item(k.other || 0, "instances not", k.other ? "warn" : ""),
    item(a.leader || "none", "leader of the arbiter", a.leader ? "" : "bad"),
    item(a.coordinator || "none", "coordinator"),
    item(list(a.voters), "voters"),
  ];
  for (const u of s.unsafe || []) out.push(el("p", { class: "warn" }, `not safe against the loss of one node: ${u.subject}: ${u.why}`));
  for (const w of s.warnings || []) out.push(el("p", { class: "warn" }, w));
  return out;
}

export function nodes(ns) {
  const role = (n) => [n.role, n.coordinator ? "coordinator" : n.voter ? "voter" : "", n.draining ? "draining" : ""].filter(Boolean).join(", ");
  return table(["Node", "State", "RTT", "Connection", "Role", "Zone", "Instances", "Since"],
    ns.map((n) => [n.name, state(n.state, n.evidence), ms(n.rtt_ms), n.connection, role(n), n.zone, n.instances, n.since ? age(Date.now() - Date.parse(n.since)) : "–"]),
    "no nodes");
}

export function instances(is) {
  return table(["Instance", "Node", "Artifact", "State", "Epoch", "Uptime", "Checkpoint", "Replicas", "Would restart on"],
    is.map((i) => [i.instance, i.node, [i.artifact, i.version].filter(Boolean).join("@"), state(i.state, i.reason), i.epoch,
      i.uptime_ms ? age(i.uptime_ms) : "–", i.checkpoint_age_ms === null ? "–" : age(i.checkpoint_age_ms) + " ago", list(i.replicas),
      i.would_restart_on ? `${i.would_restart_on}, ${ms(i.predicted_restart_ms)}` : "–"]),
    "nothing is deployed: coppice deploy app.yaml");
}

export function apps(as) {
  const links = (a) => el("span", {}, ...(a.urls || []).filter((u) => u.startsWith("/")).flatMap((u) => [el("a", { href: u }, u), " "]));
  return table(["Application", "State", "Running", "Version", "At"],
    as.map((a) => [a.application, state(a.state, a.reason), `${a.running} of ${a.instances}`, a.version, links(a)]), "no applications");
}

// ring draws the members in a circle with the instances they run.
export function ring(ns, is) {
  const out = svg("svg", { viewBox: "0 0 200 200", role: "img", "aria-label": "members and their instances" }, svg("circle", { class: "rim", cx: 100, cy: 100, r: 70 }));
  ns.forEach((n, i) => {
    const a = (2 * Math.PI * i) / ns.length - Math.PI / 2;
    const x = 100 + 70 * Math.cos(a), y = 100 + 70 * Math.sin(a);
    const mine = is.filter((k) => k.node === n.name);
    out.append(svg("circle", { class: "node " + stateClass(n.state), cx: x, cy: y, r: n.coordinator ? 17 : 14 }, svg("title", {}, `${n.name}: ${n.state}`)));
    out.append(svg("text", { x, y }, n.name.length > 6 ? n.name.slice(0, 5) + "…" : n.name));
    mine.slice(0, 24).forEach((k, j) => {
      const b = a + Math.PI + (j - (Math.min(mine.length, 24) - 1) / 2) * 0.34, r = 23;
      out.append(svg("circle", { class: "dot " + stateClass(k.state), cx: x + r * Math.cos(b), cy: y + r * Math.sin(b), r: 3 }, svg("title", {}, `${k.instance}: ${k.state}`)));
    });
  });
  return out;
}

export function event(e) {
  const t = e.time ? new Date(e.time) : new Date();
  const li = el("li", {}, el("time", { datetime: t.toISOString() }, t.toLocaleTimeString()), el("span", { class: "blue" }, e.channel), " ", el("b", {}, e.type), " ", e.message || "");
  if (e.trigger) li.append(el("span", { class: "dim" }, ` [${e.trigger}]`));
  if (e.cause) li.append(el("span", { class: "dim" }, ` because ${e.cause}`));
  return li;
}
