// The page's behavior: the live stream, the buttons, and the rate limit chart.
"use strict";

const $ = (id) => document.getElementById(id);
const account = document.body.dataset.account;
const MAX_ROWS = 10000; // in the request log
const SECONDS = 10; // the time span of the rate limit chart

// ---- the live stream

let clock = null; // the sandbox's clock minus this page's, in seconds
let limit = {};
const stream = new EventSource(`_sandbox/events?after=${document.body.dataset.stream}`);
const live = (text) => { $("live").textContent = text; $("live").dataset.state = text; };

stream.onopen = () => live("live");
stream.onerror = () => live("disconnected");
stream.addEventListener("reload", () => { stream.close(); location.reload(); });
stream.addEventListener("hello", (event) => {
  limit = JSON.parse(event.data);
  clock = limit.now - performance.now() / 1000;
  $("limit-hint").textContent = limit.limit === null
    ? "This sandbox has no rate limit."
    : `${limit.limit} requests per ${limit.period} s. Each dot is a request, each box a window; crosses are refused requests.`;
});
stream.addEventListener("requests", (event) => {
  const rows = JSON.parse(event.data);
  for (const row of rows) {
    if (row.limit !== null) addToChart(row);
    put("requests", row);
  }
  $("no-requests").hidden = $("requests").childElementCount > 0;
  while ($("requests").childElementCount > MAX_ROWS) $("requests").lastElementChild.remove();
});
stream.addEventListener("deliveries", (event) => {
  for (const row of JSON.parse(event.data)) put("deliveries", row);
  $("no-deliveries").hidden = $("deliveries").childElementCount > 0;
});
stream.addEventListener("state", refreshLists);

// Insert a new row in order, or replace an existing one; an open row stays open.
function put(list, row) {
  const template = document.createElement("template");
  template.innerHTML = row.html;
  const fresh = template.content.firstElementChild;
  const old = $(row.id);
  if (old === null) {
    const number = Number(row.id.slice(1));
    let next = $(list).firstElementChild;
    while (next !== null && Number(next.id.slice(1)) > number) next = next.nextElementSibling;
    const pinned = $(list).scrollTop; // keep the position of a reader who has scrolled down
    $(list).insertBefore(fresh, next);
    if (pinned > 0) $(list).scrollTop = pinned + fresh.offsetHeight;
  } else if (old.querySelector("details[open]")) {
    old.querySelector("summary").replaceWith(fresh.querySelector("summary"));
    old.className = fresh.className;
  } else {
    old.replaceWith(fresh);
  }
}

const currentHtml = {}; // by list
async function refreshLists() {
  const lists = await (await fetch(`_sandbox/page/state?account=${account}`)).json();
  for (const [id, html] of Object.entries(lists)) {
    const box = $(id);
    const typing = box.contains(document.activeElement) && document.activeElement.matches("input");
    if (currentHtml[id] === html || typing || box.querySelector(".move[open]") !== null) continue;
    currentHtml[id] = html;
    box.innerHTML = html;
  }
}

// ---- the log

document.addEventListener("toggle", async (event) => {
  const details = event.target;
  const row = details.closest("#requests > li");
  if (row === null || !details.open) return;
  const response = await fetch(`_sandbox/page/requests/${row.id.slice(1)}`);
  details.querySelector("summary ~ div").innerHTML = await response.text();
}, true);

document.addEventListener("toggle", (event) => { // the list may have changed while this form was open
  if (event.target.matches(".move") && !event.target.open) refreshLists();
}, true);

$("older").addEventListener("click", async () => {
  const last = $("requests").lastElementChild;
  const response = await fetch(`_sandbox/page/requests?before=${last === null ? 0 : last.id.slice(1)}`);
  const html = await response.text();
  $("requests").insertAdjacentHTML("beforeend", html);
  const end = $("requests").lastElementChild;
  $("older").hidden = html === "" || end.id === "r1" || $("requests").childElementCount >= MAX_ROWS;
});

// ---- the buttons

let messageTimer;
function showMessage(text, isError) {
  $("message").textContent = text;
  $("message").dataset.error = isError ? "yes" : "no";
  clearTimeout(messageTimer);
  messageTimer = setTimeout(() => { $("message").textContent = ""; }, isError ? 8000 : 3000);
}

function valueOf(input) {
  if (input.type === "datetime-local") return new Date(input.value).toISOString();
  return "number" in input.dataset ? Number(input.value) : input.value;
}

function bodyOf(form) {
  const body = {};
  for (const input of form.elements) {
    if (input.name && input.value !== "") body[input.name] = valueOf(input);
  }
  if (form.dataset.move) {
    body.end = new Date(new Date(body.start).getTime() + form.dataset.move * 60000).toISOString();
  }
  if (form.id === "fault") {
    const choice = form.elements.fault.selectedOptions[0];
    body.options = JSON.parse(choice.dataset.fixed);
    const value = $("option").value;
    if (choice.dataset.option) {
      body.options[choice.dataset.option] = "number" in choice.dataset ? Number(value) : value;
    }
  }
  return body;
}

document.addEventListener("submit", async (event) => {
  const form = event.target;
  event.preventDefault();
  const response = await fetch(`_sandbox/${form.dataset.url}`, {
    method: form.dataset.method,
    headers: { "Content-Type": "application/json" },
    body: form.dataset.method === "DELETE" ? null : JSON.stringify(bodyOf(form)),
  }).catch((error) => ({ ok: false, text: async () => `The sandbox cannot be reached (${error.message}).` }));
  showMessage(response.ok ? form.dataset.done : await response.text(), !response.ok);
  if (response.ok) {
    document.activeElement.blur();
    form.closest("details")?.removeAttribute("open");
    await refreshLists();
  }
});

const kind = document.querySelector("#fault select[name=fault]");
function showOption() {
  const choice = kind.selectedOptions[0];
  $("option").closest("label").hidden = !choice.dataset.option;
  $("option-label").textContent = choice.dataset.option;
  $("option").value = choice.dataset.value;
}
kind.addEventListener("change", showOption);
showOption();

$("account").addEventListener("change", (event) => { location.search = `?account=${event.target.value}`; });

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (button === null) return;
  const source = $(button.dataset.copy);
  try {
    await navigator.clipboard.writeText(source.textContent);
    showMessage("Copied.");
  } catch {
    getSelection().selectAllChildren(source); // over plain HTTP, only localhost may use the clipboard
    showMessage("Selected. Copy with Ctrl+C.");
  }
});

// ---- the rate limit chart

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 600, HEIGHT = 64, FLOOR = 58;
const keys = new Map(); // key -> latest requests, by row id

function addToChart(row) {
  if (!keys.has(row.key)) keys.set(row.key, new Map());
  keys.get(row.key).set(row.id, row);
}

function element(name, attributes) {
  const created = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) created.setAttribute(key, value);
  return created;
}

function strip(key, requests, now) {
  const x = (at) => WIDTH * (1 - (now - at) / SECONDS);
  const svg = element("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
  const windows = new Map(); // start -> requests
  for (const row of requests) {
    const start = limit.window === "fixed"
      ? Math.round((row.at + row.resetsIn - limit.period) * 50) / 50
      : Math.floor(row.at / limit.period) * limit.period;
    if (!windows.has(start)) windows.set(start, []);
    windows.get(start).push(row);
  }
  const scale = (FLOOR - 8) / Math.max(limit.limit, 1);
  for (const [start, rows] of windows) {
    if (limit.window === "fixed") {
      svg.append(element("rect", {
        class: "window", x: x(start), y: 4, width: WIDTH * limit.period / SECONDS, height: FLOOR - 4,
      }));
    }
    rows.sort((a, b) => a.at - b.at);
    rows.forEach((row, index) => {
      const y = FLOOR - 4 - Math.min(index, limit.limit) * scale;
      const at = x(row.at);
      svg.append(row.refused
        ? element("path", { class: "refused", d: `M${at - 3} ${y - 3}l6 6m0 -6l-6 6` })
        : element("circle", { class: "dot", cx: at, cy: y, r: 3 }));
    });
  }
  svg.append(element("line", { class: "axis", x1: 0, x2: WIDTH, y1: FLOOR, y2: FLOOR }));
  const last = requests[requests.length - 1];
  const resets = last ? last.at + last.resetsIn - now : 0;
  const left = last && resets > 0 ? last.remaining : limit.limit;
  const text = `${left} of ${limit.limit} left` + (resets > 0 ? `, resets in ${resets.toFixed(1)} s` : "");
  svg.setAttribute("aria-label", `${key}: ${text}`);
  const figure = document.createElement("figure");
  const caption = document.createElement("figcaption");
  const name = document.createElement("b");
  name.textContent = key;
  caption.append(name, ` ${text}`);
  figure.append(caption, svg);
  return figure;
}

function draw() {
  if (clock === null || limit.limit === null || document.hidden) return;
  const now = performance.now() / 1000 + clock;
  const strips = [];
  for (const [key, rows] of [...keys].slice(-6)) {
    for (const [id, row] of rows) if (row.at < now - SECONDS - limit.period) rows.delete(id);
    strips.push(strip(key, [...rows.values()].sort((a, b) => a.at - b.at), now));
  }
  if (strips.length === 0) strips.push(strip($("account").selectedOptions[0].textContent, [], now));
  $("strips").replaceChildren(...strips);
}
setInterval(draw, matchMedia("(prefers-reduced-motion: reduce)").matches ? 1000 : 100);
