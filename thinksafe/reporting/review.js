"use strict";
// Shows records and collects marks. All text of a record is set through textContent, so it never becomes markup.
const page = JSON.parse(document.getElementById("data").textContent);
const records = page.records;
const $ = (id) => document.getElementById(id);
const formatPercent = (share) => (share === null ? "no probability" : `${(100 * share).toFixed(1)}%`);
const formatNumber = (value) => value.toLocaleString("en-US");
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
const rank = new Map(records.map((record, index) => [record, index])); // the page lists the most uncertain first
let visible = [];
let current = null;

function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

const isSensitive = (record) => record.label === "harmful" || record.decision !== "safe";
const isVeiled = (record, part) =>
  (part === "prompt" ? record.label === "harmful" : isSensitive(record)) && !uncovered.has(`${keyOf(record)} ${part}`);

function placeNeedle(gauge, record) {
  const needle = gauge.querySelector(".needle");
  needle.hidden = record.share === null;
  needle.style.left = `${100 * (record.share ?? 0)}%`;
}

function listEntry(record) {
  const button = element("button");
  button.append(element("span", "dot"), element("span", "head", record.prompt.slice(0, 200)));
  button.append(element("span", "sub", [record.decision, record.reason, record.category].filter((word, i, all) => word && all.indexOf(word) === i).join(" · ").replaceAll("_", " ")));
  const mini = element("span", "mini"), gauge = element("span", "gauge");
  gauge.style.display = "block";
  gauge.append(element("span", "needle"));
  mini.append(gauge, element("span", "figure", formatPercent(record.share)));
  placeNeedle(gauge, record);
  button.append(mini);
  button.addEventListener("click", () => select(record));
  const entry = element("li");
  entry.append(button);
  return entry;
}
const entries = new Map(records.map((record) => [record, listEntry(record)]));

const orders = {
  doubt: (a, b) => rank.get(a) - rank.get(b),
  unsafe: (a, b) => (b.share ?? -1) - (a.share ?? -1) || orders.doubt(a, b),
  safe: (a, b) => (a.share ?? 2) - (b.share ?? 2) || orders.doubt(a, b),
  long: (a, b) => b.tokens - a.tokens || orders.doubt(a, b),
};
const isMarked = (record) => marks.has(keyOf(record)) || record.marks.length > 0; // on this page, or before in the run
function matchesFilter(record) {
  const filter = $("filter").value, words = $("search").value.toLowerCase();
  const fits = filter === "all" || (filter === "unmarked" ? !isMarked(record) : [record.decision, record.label].includes(filter));
  return fits && (!words || `${record.prompt}\n${record.think}\n${record.answer}`.toLowerCase().includes(words));
}

function updateList() {
  visible = records.filter(matchesFilter).sort(orders[$("order").value]);
  $("list").replaceChildren(...visible.map((record) => entries.get(record)));
  if (!visible.includes(current)) select(visible[0] ?? null);
}

function updateView() {
  for (const record of records) {
    const button = entries.get(record).firstChild, mark = marks.get(keyOf(record)) ?? record.marks.at(-1);
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
  for (const part of ["prompt", "think", "answer"]) {
    const hidden = current !== null && isVeiled(current, part);
    $(part).classList.toggle("hidden-text", hidden);
    $(part).querySelector("pre").toggleAttribute("inert", hidden);
  }
}

function chip(id, kind, text) {
  $(id).className = `chip ${kind}`;
  $(id).textContent = text;
}

// Returns the P(unsafe) of each member of an ensemble, and all other probabilities, the likeliest first.
function splitLabels(labels) {
  const votes = [], rest = new Map(Object.entries(labels));
  for (const name of Object.keys(labels).filter((name) => name.endsWith("/unsafe"))) {
    const member = name.slice(0, -"/unsafe".length), unsafe = labels[name], safe = labels[`${member}/safe`];
    if (safe === undefined) continue;
    votes.push([member, safe + unsafe > 0 ? unsafe / (safe + unsafe) : null]);
    rest.delete(name);
    rest.delete(`${member}/safe`);
  }
  return { votes, labels: [...rest].sort((a, b) => b[1] - a[1]) };
}

function select(record) {
  current = record;
  $("record").hidden = !record;
  $("no-match").hidden = !!record;
  if (record) {
    const reason = record.reason && record.reason !== record.decision ? `: ${record.reason.replaceAll("_", " ")}` : "";
    chip("decision", record.decision, record.decision + reason);
    chip("label", record.label, `${record.label} prompt`);
    chip("kept", record.kept ? "kept" : "out", record.kept ? "in the training set" : "not in the training set");
    placeNeedle($("gauge"), record);
    $("share").textContent = record.share === null ? "no probabilities" : `P(unsafe) ${formatPercent(record.share)}`;
    $("gauge").setAttribute("aria-label", $("share").textContent);
    for (const part of ["prompt", "think", "answer"]) $(part).querySelector("pre").textContent = record[part];
    $("thought").open = false;
    $("thought").hidden = !record.think;
    $("thought-length").textContent = `${formatNumber(record.think.length)} characters`;
    const { votes, labels } = splitLabels(record.labels);
    const facts = [
      ["category", record.category],
      ["refusal", record.refusal === null ? "" : record.refusal ? "yes" : "no"],
      ["attempt", `rung ${record.rung}, sample ${record.sample}`],
      ["tokens", formatNumber(record.tokens)],
      ["windows", record.windows > 1 ? formatNumber(record.windows) : ""],
      ["P(unsafe) of each guard", votes.map(([name, p]) => `${name} ${formatPercent(p)}`).join(", ")],
      ["label probabilities", labels.slice(0, 4).map(([name, p]) => `${name} ${formatPercent(p)}`).join(", ")],
      ["guard", record.guard],
      ["steering", record.steering ?? "none"],
    ];
    $("facts").replaceChildren(...facts.filter(([, text]) => text).map(([name, text]) => {
      const pair = element("div");
      pair.append(element("dt", "", name), element("dd", "", text));
      return pair;
    }));
    $("earlier-marks").replaceChildren(...record.marks.map((mark) => element("li", "", `${mark.by}: ${mark.decision}, ${mark.at}`)));
    entries.get(record).scrollIntoView({ block: "nearest" });
    $("record").scrollTop = 0;
  }
  updateView();
}

function move(offset) {
  const nextRecord = visible[visible.indexOf(current) + offset];
  if (nextRecord) select(nextRecord);
}

function saveMarks() {
  unsaved = true;
  storeLocally(storageKey, [...marks]);
}

function mark(decision) {
  if (!current) return;
  const by = $("name").value.trim();
  document.querySelector(".who").classList.toggle("missing", !by);
  if (!by) return $("name").focus();
  if (decision === "accept" && isVeiled(current, "answer")) return uncover(["prompt", "answer"]); // nobody can accept an unread answer
  const { prompt_id, sample, text_id } = current;
  marks.set(keyOf(current), { prompt_id, sample, text_id, decision, by, at: new Date().toISOString() });
  saveMarks();
  const nextRecord = visible[visible.indexOf(current) + 1];
  updateList();
  if (nextRecord && visible.includes(nextRecord)) select(nextRecord);
  else updateView();
}

function unmark() {
  if (!current) return;
  marks.delete(keyOf(current));
  saveMarks();
  updateList();
  updateView();
}

function uncover(parts) {
  for (const part of parts) uncovered.add(`${keyOf(current)} ${part}`);
  updateView();
}

function download() {
  const lines = [...marks.values()].map((mark) => `${JSON.stringify(mark)}\n`).join("");
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([lines], { type: "application/jsonl" }));
  link.download = "marks.jsonl";
  link.click();
  URL.revokeObjectURL(link.href);
  unsaved = false;
  $("saved").showModal();
}

// Imports the marks on responses of this page; if a response has two marks, the later one counts.
function importMarks(text) {
  let imported = 0, skipped = 0;
  for (const line of text.split("\n").filter((line) => line.trim())) {
    let mark = null;
    try { mark = JSON.parse(line); } catch { /* counted below */ }
    if (!["accept", "reject"].includes(mark?.decision) || typeof mark.by !== "string" || isNaN(Date.parse(mark.at)) || textIds.get(keyOf(mark)) !== mark.text_id) {
      skipped += 1;
      continue;
    }
    imported += 1;
    const { prompt_id, sample, text_id, decision, by, at } = mark, existing = marks.get(keyOf(mark));
    if (!existing || Date.parse(existing.at) < Date.parse(at)) marks.set(keyOf(mark), { prompt_id, sample, text_id, decision, by, at });
  }
  return { imported, skipped };
}

async function load() {
  const [file] = $("load").files;
  if (!file) return;
  const { imported, skipped } = importMarks(await file.text());
  $("load").value = ""; // so that the same file can be loaded again
  storeLocally(storageKey, [...marks]);
  updateList();
  updateView();
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
$("name").addEventListener("change", () => {
  storeLocally("thinksafe-review-name", $("name").value.trim());
  document.querySelector(".who").classList.remove("missing");
});
for (const id of ["order", "filter"]) $(id).addEventListener("change", updateList);
$("search").addEventListener("input", updateList);
for (const part of ["prompt", "think", "answer"]) $(part).querySelector(".veil").addEventListener("click", () => uncover([part]));
const actions = {
  a: () => mark("accept"),
  r: () => mark("reject"),
  u: unmark,
  j: () => move(1),
  k: () => move(-1),
  v: () => current && uncover(["prompt", "think", "answer"]),
  t: () => { $("thought").open = !$("thought").open; },
};
document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input, select") || document.querySelector("dialog[open]");
  if (!typing && !event.ctrlKey && !event.metaKey && !event.altKey && actions[event.key]) {
    event.preventDefault();
    actions[event.key]();
  }
});
for (const [id, key] of [["accept", "a"], ["reject", "r"], ["clear", "u"], ["next", "j"], ["previous", "k"]]) $(id).addEventListener("click", actions[key]);
$("download").addEventListener("click", download);
$("load").addEventListener("change", load);
addEventListener("beforeunload", (event) => { if (unsaved) event.preventDefault(); });
updateList();
