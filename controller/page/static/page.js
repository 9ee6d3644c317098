// The page of mesh-controller: fetches the graph, draws it, and asks for the plan of a call. All that comes from elsewhere becomes text nodes and numbers.
"use strict";

const POLL_MS = 3000;
const SMALLEST = 0.65;
const SVG = "http://www.w3.org/2000/svg";
const at = (id) => document.getElementById(id);

let token = ""; // kept here only: who loads the page again shows it again
let chosen = ""; // the key of the arrow whose details are shown
const drawn = new Map(); // key -> element

async function ask(path) {
  const response = await fetch(path, token ? { headers: { Authorization: `Bearer ${token}` } } : {});
  if (response.status === 401) {
    at("door").hidden = false;
    throw new Error(token ? "the token is not the one that this controller was given" : "this page wants a token");
  }
  if (!response.ok) throw new Error((await response.text()).slice(0, 300) || `status ${response.status}`);
  at("door").hidden = true;
  return response.json();
}

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function shape(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  set(made, attributes);
  if (text !== undefined) made.textContent = text;
  return made;
}

function set(made, attributes) {
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, String(value));
}

const named = (box) => box.name || "outside the mesh";
const cut = (text) => (text.length > 28 ? `${text.slice(0, 27)}…` : text);

// What was there stays the same element, so that a click or the focus survives a change.
function keep(key, make) {
  if (!drawn.has(key)) drawn.set(key, at("graph").appendChild(make()));
  return drawn.get(key);
}

function draw(graph) {
  const svg = at("graph");
  const [width, height] = graph.size;
  const scale = Math.min(1, Math.max(SMALLEST, (at("canvas").clientWidth - 16) / width)); // what is wider still is scrolled
  set(svg, { width: width * scale, height: height * scale, viewBox: `0 0 ${width} ${height}` });
  const now = new Set();
  for (const arrow of graph.arrows) {
    const [start, end] = [graph.boxes[arrow.start], graph.boxes[arrow.end]];
    const key = `${start.kind} ${start.name} > ${end.kind} ${end.name}${arrow.calls.length ? "" : " part"}`;
    now.add(key);
    const group = keep(key, newArrow);
    const mtls = arrow.mtls === "all" || arrow.mtls === "some";
    const classes = ["arrow", arrow.state, arrow.calls.length ? "" : "part", mtls ? "mtls" : "", key === chosen ? "chosen" : ""];
    set(group, { class: classes.filter(Boolean).join(" "), "data-key": key });
    const [line, grip, label] = group.children;
    set(line, { d: arrow.path, "marker-end": `url(#end-${arrow.state})` });
    set(grip, { d: arrow.path });
    set(label, { x: arrow.labelPlace[0], y: arrow.labelPlace[1] });
    label.textContent = arrow.label;
    if (arrow.calls.length) {
      set(group, { tabindex: 0, role: "button", "aria-label": `${named(start)} to ${named(end)}: ${arrow.label}` });
      group.open = () => choose(key, start, end, arrow.calls);
    }
    if (key === chosen) describe(start, end, arrow.calls);
  }
  for (const box of graph.boxes) {
    const key = `${box.kind} ${box.name}`;
    now.add(key);
    const group = keep(key, () => newBox(box, graph.box));
    set(group, { transform: `translate(${box.place[0]} ${box.place[1]})` });
  }
  for (const [key, old] of drawn) {
    if (!now.has(key)) {
      old.remove();
      drawn.delete(key);
    }
  }
}

function newArrow() {
  const group = shape("g", {});
  group.append(shape("path", {}), shape("path", { class: "grip" }), shape("text", { "text-anchor": "middle" }));
  group.addEventListener("click", () => group.open && group.open());
  group.addEventListener("keydown", (event) => {
    if ((event.key === "Enter" || event.key === " ") && group.open) {
      event.preventDefault();
      group.open();
    }
  });
  return group;
}

function newBox(box, [width, height]) {
  const group = shape("g", { class: `box ${box.kind}` });
  group.append(
    shape("title", {}, box.name ? `${box.kind} ${box.name}` : named(box)),
    shape("rect", { width, height, rx: box.kind === "service" ? height / 2 : 4 }),
    shape("text", { x: width / 2, y: height / 2 + 4, "text-anchor": "middle" }, cut(named(box))),
  );
  return group;
}

function choose(key, start, end, calls) {
  chosen = key;
  for (const one of drawn.values()) one.classList.toggle("chosen", one.dataset.key === key);
  const details = at("details");
  details.hidden = false;
  details.replaceChildren(element("h2"), element("div"), element("div"));
  describe(start, end, calls);
  const plans = details.children[2];
  const asked = [...new Set(calls.map((call) => call.plan).filter(Boolean))];
  for (const destination of asked) showPlan(plans.appendChild(element("section")), calls[0].source, destination);
}

function describe(start, end, calls) {
  const [title, facts] = at("details").children;
  title.textContent = `${named(start)} → ${named(end)}`;
  facts.replaceChildren(...calls.flatMap((call) => [
    element("h3", [call.protocol, call.port || ""].join(" ").trim()),
    list([
      [call.protocol === "http" ? "requests/s" : "connections/s", amount(call.rate)],
      ["errors/s", amount(call.errors), call.errors > 0],
      ["denied/s", amount(call.denied), call.denied > 0],
      ...call.rules.map((rule) => ["denied by", rule, true]),
      ["p50, p99", call.p50 === null ? "not measured" : `${milliseconds(call.p50)}, ${milliseconds(call.p99)}`],
      ["bytes/s", amount(call.bytes)],
      ["live", String(call.active)],
      ["mTLS", { all: "yes", some: "in part", none: "no" }[call.mtls] || "-"],
      ...call.backends.map((one) => ["answered", `${one.workload} ${amount(one.rate)}/s${one.mtls ? ", mTLS" : ""}`]),
    ]),
  ]));
}

async function showPlan(place, source, destination) {
  place.append(element("h3", `plan of trace ${source} ${destination}`));
  const waiting = place.appendChild(element("p", "asking the node …"));
  let plan;
  try {
    plan = await ask(`plan.json?${new URLSearchParams({ source, destination })}`);
  } catch (error) {
    plan = { error: error.message };
  }
  waiting.remove();
  if (plan.error) {
    place.append(element("p", plan.error, "bad"));
    return;
  }
  const text = (value) => (value === null || value === undefined ? "-" : String(value));
  place.append(list([
    ["verdict", text(plan.verdict), plan.verdict === "DENY"],
    ...(plan.rule ? [["rule", text(plan.rule)]] : []),
    ...(plan.audit ? [["audit", `enforcing ${text(plan.audit)} would deny`]] : []),
    ["level", `${text(plan.level)}: ${text(plan.reason)}`],
    ...array(plan.backends).map((one) => ["backend", `${(one.share * 100).toFixed(1)}% ${text(one.workload)} ${text(one.address)} on ${text(one.node)}`]),
    ["encryption", text(plan.encryption)],
    ["fail mode", text(plan.failMode)],
    ...array(plan.problems).map((problem) => ["problem", text(problem), true]),
  ]));
}

const array = (value) => (Array.isArray(value) ? value : []);

function list(rows) {
  const made = element("dl");
  for (const [name, value, bad] of rows) made.append(element("dt", name), element("dd", value, bad ? "bad" : ""));
  return made;
}

function amount(value) {
  return value < 10 ? String(Number(value.toPrecision(2))) : new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }).format(value);
}

const milliseconds = (seconds) => `${Number((seconds * 1000).toPrecision(2))} ms`;

async function refresh() {
  try {
    const graph = await ask("graph.json");
    draw(graph);
    const calls = graph.arrows.filter((arrow) => arrow.calls.length).length;
    const left = graph.notShown ? `, ${graph.notShown} quieter ones are not shown` : "";
    at("state").textContent = `${calls} calls on ${graph.nodes.join(", ") || "no node"}, over ${graph.seconds.toFixed(0)} s${left}`;
    const doubted = graph.doubted ? [`${graph.doubted} calls were told by nodes that cannot know them, and are not shown`] : [];
    at("problems").replaceChildren(...[...graph.problems, ...doubted].map((problem) => element("li", problem)));
  } catch (error) {
    at("state").textContent = error.message;
  }
}

async function follow() {
  if (!document.hidden) await refresh();
  setTimeout(follow, POLL_MS);
}

at("door").addEventListener("submit", (event) => {
  event.preventDefault();
  token = at("token").value.trim();
  at("token").value = "";
  refresh();
});
const ends = at("graph").appendChild(shape("defs", {}));
for (const state of ["good", "failing", "denied", "idle"]) {
  const marker = shape("marker", { id: `end-${state}`, viewBox: "0 0 8 8", refX: 8, refY: 4, markerWidth: 9, markerHeight: 9, markerUnits: "userSpaceOnUse", orient: "auto" });
  marker.append(shape("path", { d: "M0 0L8 4L0 8z", class: `end ${state}` }));
  ends.append(marker);
}
follow();
