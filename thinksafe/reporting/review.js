"use strict";
// Shows records and collects marks. All text of a record is set through textContent, so it never becomes markup.
const $ = (id) => document.getElementById(id);
const page = JSON.parse($("data").textContent), records = page.records, parts = ["prompt", "think", "answer"];
const formatPercent = (share) => (share === null ? "no probability" : `${(100 * share).toFixed(1)}%`);
const formatNumber = (value) => value.toLocaleString("en-US");
const withSpaces = (text) => text.replaceAll("_", " ");
const keyOf = (record) => `${record.prompt_id}/${record.sample}`;

// The downloaded file is the result. Local storage, if the browser allows it, keeps the marks when the tab is closed.
const storageKey = `thinksafe-review-${page.run}`;
function loadStored(name, fallback) {
  try { return JSON.parse(localStorage.getItem(name)) ?? fallback; } catch { return fallback; }
}
function storeLocally(name, value) {
  try { localStorage.setItem(name, JSON.stringify(value)); } catch { /* private window */ }
}
const textIds = new Map(records.map((record) => [keyOf(record), record.text_id]));
const marks = new Map(loadStored(storageKey, []).filter(([key, mark]) => textIds.get(key) === mark.text_id));
let unsaved = false; // whether marks changed since the last download
const uncovered = new Set(); // texts that are no longer blurred
let visible = [], current = null;

function isVeiled(record, part) {
  const isSensitive = record.label === "harmful" || (part !== "prompt" && record.decision !== "safe");
  return isSensitive && !uncovered.has(`${keyOf(record)} ${part}`);
}

function placeNeedle(needle, record) {
  needle.hidden = record.unsafe_share === null;
  needle.style.left = `${100 * (record.unsafe_share ?? 0)}%`;
}

function listEntry(record) {
  const entry = $("entry").content.firstElementChild.cloneNode(true), part = (name) => entry.querySelector(name);
  part(".head").textContent = record.prompt.slice(0, 200);
  const words = new Set([record.decision, record.reason, record.category].filter(Boolean));
  part(".sub").textContent = withSpaces([...words].join(" · "));
  part(".figure").textContent = formatPercent(record.unsafe_share);
  placeNeedle(part(".needle"), record);
  part("button").addEventListener("click", () => select(record));
  return entry;
}
const entries = new Map(records.map((record) => [record, listEntry(record)]));

const orders = { // the page lists the most uncertain first, and sorting keeps the order of equal records
  doubt: () => 0,
  unsafe: (a, b) => (b.unsafe_share ?? -1) - (a.unsafe_share ?? -1),
  safe: (a, b) => (a.unsafe_share ?? 2) - (b.unsafe_share ?? 2),
  long: (a, b) => b.num_tokens - a.num_tokens,
};
const isMarked = (record) => marks.has(keyOf(record)) || record.marks.length > 0; // on this page, or before in the run
function matchesFilter(record) {
  const filter = $("filter").value, words = $("search").value.toLowerCase();
  if (filter === "unmarked" ? isMarked(record) : !["all", record.decision, record.label].includes(filter)) return false;
  return parts.map((part) => record[part]).join("\n").toLowerCase().includes(words);
}

function updateList() {
  visible = records.filter(matchesFilter).sort(orders[$("order").value]);
  $("list").replaceChildren(...visible.map((record) => entries.get(record)));
  if (!visible.includes(current)) select(visible[0] ?? null);
}

function updateView() {
  for (const record of records) {
    const button = entries.get(record).firstElementChild, mark = marks.get(keyOf(record)) ?? record.marks.at(-1);
    button.className = mark ? mark.decision : "";
    button.toggleAttribute("aria-current", record === current);
    button.querySelector(".head").classList.toggle("veil-text", isVeiled(record, "prompt"));
  }
  const mark = current && marks.get(keyOf(current));
  for (const decision of ["accept", "reject"]) {
    $(decision).classList.toggle("on", mark?.decision === decision);
    $(decision).disabled = !current;
  }
  $("clear").disabled = !mark;
  const done = records.filter(isMarked).length;
  $("done").textContent = `${formatNumber(done)} of ${formatNumber(records.length)} marked`;
  $("done-bar").style.width = `${(100 * done) / Math.max(records.length, 1)}%`;
  $("download").disabled = !marks.size;
  for (const part of parts) {
    const hidden = current !== null && isVeiled(current, part);
    $(part).classList.toggle("hidden-text", hidden);
    $(part).querySelector("pre").toggleAttribute("inert", hidden);
  }
}

// Returns the P(unsafe) of each member of an ensemble, and all other probabilities, the likeliest first.
function splitLabels(labels) {
  const votes = [], rest = new Map(Object.entries(labels));
  for (const [name, unsafe] of Object.entries(labels)) {
    const member = name.replace(/\/unsafe$/, ""), safe = labels[`${member}/safe`];
    if (member === name || safe === undefined) continue;
    votes.push([member, safe + unsafe > 0 ? unsafe / (safe + unsafe) : null]);
    for (const vote of ["safe", "unsafe"]) rest.delete(`${member}/${vote}`);
  }
  return { votes, others: [...rest].sort((a, b) => b[1] - a[1]).slice(0, 4) };
}

function element(tag, text, ...children) {
  const node = document.createElement(tag);
  node.textContent = text;
  node.append(...children);
  return node;
}

function chip(id, kind, text) {
  $(id).className = `chip ${kind}`;
  $(id).textContent = text;
}

function select(record) {
  current = record;
  $("record").hidden = !record;
  $("no-match").hidden = !!record;
  if (record) show(record);
  updateView();
}

function show(record) {
  const reason = record.reason && record.reason !== record.decision ? `: ${withSpaces(record.reason)}` : "";
  chip("decision", record.decision, record.decision + reason);
  chip("label", record.label, `${record.label} prompt`);
  chip("kept", record.kept ? "kept" : "out", record.kept ? "in the training set" : "not in the training set");
  placeNeedle($("needle"), record);
  $("share").textContent = record.unsafe_share === null ? "no probabilities" : `P(unsafe) ${formatPercent(record.unsafe_share)}`;
  $("gauge").setAttribute("aria-label", $("share").textContent);
  for (const part of parts) $(part).querySelector("pre").textContent = record[part];
  $("thought").open = false;
  $("thought").hidden = !record.think;
  $("thought-length").textContent = `${formatNumber(record.think.length)} characters`;
  const { votes, others } = splitLabels(record.labels);
  const list = (pairs) => pairs.map(([name, p]) => `${name} ${formatPercent(p)}`).join(", ");
  const facts = [
    ["category", record.category],
    ["refusal", record.refusal === null ? "" : record.refusal ? "yes" : "no"],
    ["attempt", `rung ${record.rung}, sample ${record.sample}`],
    ["tokens", formatNumber(record.num_tokens)],
    ["windows", record.windows > 1 ? formatNumber(record.windows) : ""],
    ["P(unsafe) of each guard", list(votes)],
    ["label probabilities", list(others)],
    ["guard", record.guard],
    ["steering", record.steering ?? "none"],
  ].filter(([, text]) => text);
  $("facts").replaceChildren(...facts.map(([name, text]) => element("div", "", element("dt", name), element("dd", text))));
  $("earlier-marks").replaceChildren(...record.marks.map((mark) => element("li", `${mark.by}: ${mark.decision}, ${mark.at}`)));
  entries.get(record).scrollIntoView({ block: "nearest" });
  $("record").scrollTop = 0;
}

function move(offset) {
  const nextRecord = visible[visible.indexOf(current) + offset];
  if (nextRecord) select(nextRecord);
}

function storeMarks() {
  storeLocally(storageKey, [...marks]);
  updateList();
  updateView();
}

function mark(decision) {
  if (!current) return;
  const by = $("name").value.trim();
  $("who").classList.toggle("missing", !by);
  if (!by) return $("name").focus();
  if (decision === "accept" && isVeiled(current, "answer")) return uncover("prompt", "answer"); // nobody can accept an unread answer
  const { prompt_id, sample, text_id } = current, nextRecord = visible[visible.indexOf(current) + 1];
  marks.set(keyOf(current), { prompt_id, sample, text_id, decision, by, at: new Date().toISOString() });
  unsaved = true;
  storeMarks();
  if (visible.includes(nextRecord)) select(nextRecord);
}

function unmark() {
  if (!current) return;
  marks.delete(keyOf(current));
  unsaved = true;
  storeMarks();
}

function uncover(...names) {
  for (const part of names) uncovered.add(`${keyOf(current)} ${part}`);
  updateView();
}

function download() {
  const lines = [...marks.values()].map((mark) => `${JSON.stringify(mark)}\n`);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(lines, { type: "application/jsonl" }));
  link.download = "marks.jsonl";
  link.click();
  URL.revokeObjectURL(link.href);
  unsaved = false;
  $("saved").showModal();
}

// Returns whether a line is a mark on a response of this page; if so, adds the mark unless the page has a later one.
function importMark(line) {
  let value = null;
  try { value = JSON.parse(line); } catch { return false; }
  const { prompt_id, sample, text_id, decision, by, at } = value ?? {};
  const mark = { prompt_id, sample, text_id, decision, by, at }, key = keyOf(mark), existing = marks.get(key);
  const isOfThisPage = textIds.has(key) && textIds.get(key) === text_id;
  if (!isOfThisPage || !["accept", "reject"].includes(decision) || typeof by !== "string" || isNaN(Date.parse(at))) return false;
  if (!existing || Date.parse(existing.at) < Date.parse(at)) marks.set(key, mark);
  return true;
}

async function load() {
  const [file] = $("load").files;
  if (!file) return;
  const lines = (await file.text()).split("\n").filter((line) => line.trim());
  const imported = lines.filter(importMark).length, skipped = lines.length - imported;
  $("load").value = ""; // so that the same file can be loaded again
  storeMarks();
  const note = skipped ? ` Lines skipped because they are not marks on responses of this page: ${formatNumber(skipped)}; keep that file too.` : "";
  $("load-result").textContent = `Marks loaded from ${file.name}: ${formatNumber(imported)}.${note}`;
  $("loaded").showModal();
}

const numLeftOut = page.judged - records.length;
$("scope").textContent = [
  numLeftOut ? `the ${formatNumber(records.length)} most uncertain of ${formatNumber(page.judged)} judged responses` : `all ${formatNumber(page.judged)} judged responses`,
  numLeftOut ? `${formatNumber(numLeftOut)} more certain ones are not shown` : "",
  page.malformed ? `${formatNumber(page.malformed)} malformed not shown` : "",
].filter(Boolean).join(" · ");
$("too-late").hidden = !page.too_late;
$("command").textContent = page.command;
$("name").value = loadStored("thinksafe-review-name", "");
$("tick").style.left = `${100 * page.threshold}%`;
$("band").style.left = `${100 * (page.threshold - page.margin)}%`;
$("band").style.width = `${200 * page.margin}%`;
const actions = {
  a: () => mark("accept"),
  r: () => mark("reject"),
  u: unmark,
  j: () => move(1),
  k: () => move(-1),
  v: () => current && uncover(...parts),
  t: () => { $("thought").open = !$("thought").open; },
};
for (const button of document.querySelectorAll("[data-key]")) button.addEventListener("click", actions[button.dataset.key]);
for (const part of parts) $(part).querySelector(".veil").addEventListener("click", () => uncover(part));
for (const id of ["order", "filter"]) $(id).addEventListener("change", updateList);
$("search").addEventListener("input", updateList);
$("name").addEventListener("change", () => {
  storeLocally("thinksafe-review-name", $("name").value.trim());
  $("who").classList.remove("missing");
});
$("download").addEventListener("click", download);
$("load").addEventListener("change", load);
addEventListener("keydown", (event) => {
  const typing = event.target.matches("input, select") || document.querySelector("dialog[open]");
  if (typing || event.ctrlKey || event.metaKey || event.altKey || !actions[event.key]) return;
  event.preventDefault();
  actions[event.key]();
});
addEventListener("beforeunload", (event) => { if (unsaved) event.preventDefault(); });
updateList();
