"use strict";
// Shows records as text and collects marks. Nothing of a record ever becomes markup: it goes through textContent.
const page = JSON.parse(document.getElementById("data").textContent);
const records = page.records;
const $ = (id) => document.getElementById(id);
const percent = (share) => (share === null ? "no figure" : `${(100 * share).toFixed(1)}%`);
const number = (value) => value.toLocaleString("en-US");
const keyOf = (record) => `${record.prompt_id}/${record.sample}`;

// The file of marks is what counts. What was marked outlives a closed tab too, where the browser allows it.
const shelf = `thinksafe-review-${page.run}`;
function remembered(name, otherwise) {
  try { return JSON.parse(localStorage.getItem(name)) ?? otherwise; } catch { return otherwise; }
}
function remember(name, value) {
  try { localStorage.setItem(name, JSON.stringify(value)); } catch { /* private window */ }
}
const known = new Map(records.map((record) => [keyOf(record), record.text_id]));
const marks = new Map(remembered(shelf, []).filter(([key, mark]) => known.get(key) === mark.text_id));
let unsaved = false; // marked since the last download
const shown = new Set(); // records whose text was uncovered
const rank = new Map(records.map((record, place) => [record, place])); // they come most uncertain first
let visible = [];
let current = null;

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

const sensitive = (record) => record.label === "harmful" || record.decision !== "safe";
const veiled = (record, part) =>
  (part === "prompt" ? record.label === "harmful" : sensitive(record)) && !shown.has(`${keyOf(record)} ${part}`);

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
  mini.append(gauge, element("span", "figure", percent(record.share)));
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
const isMarked = (record) => marks.has(keyOf(record)) || record.marks.length > 0; // here, or in the run already
function wanted(record) {
  const only = $("only").value, words = $("search").value.toLowerCase();
  const fits = only === "all" || (only === "unmarked" ? !isMarked(record) : [record.decision, record.label].includes(only));
  return fits && (!words || `${record.prompt}\n${record.think}\n${record.answer}`.toLowerCase().includes(words));
}

function arrange() {
  visible = records.filter(wanted).sort(orders[$("order").value]);
  $("list").replaceChildren(...visible.map((record) => entries.get(record)));
  if (!visible.includes(current)) select(visible[0] ?? null);
}

function refresh() {
  for (const record of records) {
    const button = entries.get(record).firstChild, mark = marks.get(keyOf(record)) ?? record.marks.at(-1);
    button.className = mark ? mark.decision : "";
    button.toggleAttribute("aria-current", record === current);
    button.querySelector(".head").classList.toggle("veil-text", veiled(record, "prompt"));
  }
  const mark = current && marks.get(keyOf(current));
  for (const decision of ["accept", "reject"]) {
    $(decision).classList.toggle("on", mark?.decision === decision);
    $(decision).disabled = !current;
  }
  $("clear").disabled = !mark;
  const done = records.filter(isMarked).length;
  $("done").textContent = `${number(done)} of ${number(records.length)} marked`;
  $("done-bar").style.width = `${(100 * done) / Math.max(records.length, 1)}%`;
  $("download").disabled = !marks.size;
  for (const part of ["prompt", "think", "answer"]) {
    const hidden = current !== null && veiled(current, part);
    $(part).classList.toggle("hidden-text", hidden);
    $(part).querySelector("pre").toggleAttribute("inert", hidden);
  }
}

function chip(id, kind, text) {
  $(id).className = `chip ${kind}`;
  $(id).textContent = text;
}

// What a guard said beside its verdict, the likeliest first, and of an ensemble what every member's verdict was.
function told(labels) {
  const votes = [], rest = new Map(Object.entries(labels));
  for (const name of Object.keys(labels).filter((each) => each.endsWith("/unsafe"))) {
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
  $("nothing").hidden = !!record;
  if (record) {
    const why = record.reason && record.reason !== record.decision ? `: ${record.reason.replaceAll("_", " ")}` : "";
    chip("decision", record.decision, record.decision + why);
    chip("label", record.label, `${record.label} prompt`);
    chip("fate", record.kept ? "kept" : "out", record.kept ? "in the training set" : "not in the training set");
    placeNeedle($("gauge"), record);
    $("share").textContent = record.share === null ? "no probabilities" : `P(unsafe) ${percent(record.share)}`;
    $("gauge").setAttribute("aria-label", $("share").textContent);
    for (const part of ["prompt", "think", "answer"]) $(part).querySelector("pre").textContent = record[part];
    $("thought").open = false;
    $("thought").hidden = !record.think;
    $("thought-length").textContent = `${number(record.think.length)} characters`;
    const { votes, labels } = told(record.labels);
    const facts = [
      ["category", record.category],
      ["refuses", record.refusal === null ? "" : record.refusal ? "yes" : "no"],
      ["attempt", `rung ${record.rung}, sample ${record.sample}`],
      ["tokens", number(record.tokens)],
      ["windows", record.windows > 1 ? number(record.windows) : ""],
      ["P(unsafe) of each guard", votes.map(([name, p]) => `${name} ${percent(p)}`).join(", ")],
      ["also", labels.slice(0, 4).map(([name, p]) => `${name} ${percent(p)}`).join(", ")],
      ["guard", record.guard],
      ["steering", record.steering ?? "none"],
    ];
    $("facts").replaceChildren(...facts.filter(([, text]) => text).map(([name, text]) => {
      const pair = element("div");
      pair.append(element("dt", "", name), element("dd", "", text));
      return pair;
    }));
    $("others").replaceChildren(...record.marks.map((mark) => element("li", "", `${mark.by}: ${mark.decision}, ${mark.at}`)));
    entries.get(record).scrollIntoView({ block: "nearest" });
    $("record").scrollTop = 0;
  }
  refresh();
}

function step(by) {
  const next = visible[visible.indexOf(current) + by];
  if (next) select(next);
}

function keep() {
  unsaved = true;
  remember(shelf, [...marks]);
}

function mark(decision) {
  if (!current) return;
  const by = $("name").value.trim();
  document.querySelector(".who").classList.toggle("missing", !by);
  if (!by) return $("name").focus();
  if (decision === "accept" && veiled(current, "answer")) return uncover(["prompt", "answer"]); // nobody accepts unread
  const { prompt_id, sample, text_id } = current;
  marks.set(keyOf(current), { prompt_id, sample, text_id, decision, by, at: new Date().toISOString() });
  keep();
  const following = visible[visible.indexOf(current) + 1];
  arrange();
  if (following && visible.includes(following)) select(following);
  else refresh();
}

function unmark() {
  if (!current) return;
  marks.delete(keyOf(current));
  keep();
  arrange();
  refresh();
}

function uncover(parts) {
  for (const part of parts) shown.add(`${keyOf(current)} ${part}`);
  refresh();
}

function download() {
  const lines = [...marks.values()].map((each) => `${JSON.stringify(each)}\n`).join("");
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([lines], { type: "application/jsonl" }));
  link.download = "marks.jsonl";
  link.click();
  URL.revokeObjectURL(link.href);
  unsaved = false;
  $("saved").showModal();
}

// Of a file of marks those that are about what this page shows; of two on one response the later one.
function take(text) {
  let taken = 0, other = 0;
  for (const line of text.split("\n").filter((each) => each.trim())) {
    let found = null;
    try { found = JSON.parse(line); } catch { /* counted below */ }
    if (!["accept", "reject"].includes(found?.decision) || typeof found.by !== "string" || isNaN(Date.parse(found.at)) || known.get(keyOf(found)) !== found.text_id) {
      other += 1;
      continue;
    }
    taken += 1;
    const { prompt_id, sample, text_id, decision, by, at } = found, mine = marks.get(keyOf(found));
    if (!mine || Date.parse(mine.at) < Date.parse(at)) marks.set(keyOf(found), { prompt_id, sample, text_id, decision, by, at });
  }
  return { taken, other };
}

async function load() {
  const [file] = $("load").files;
  if (!file) return;
  const { taken, other } = take(await file.text());
  $("load").value = ""; // the same file may be given again
  remember(shelf, [...marks]);
  arrange();
  refresh();
  const rest = other ? ` Lines that are no marks on what this page shows: ${number(other)}; keep that file too.` : "";
  $("found").textContent = `Marks found in ${file.name}: ${number(taken)}.${rest}`;
  $("loaded").showModal();
}

const left = page.judged - records.length;
$("scope").textContent = [
  left ? `the ${number(records.length)} most uncertain of ${number(page.judged)} judged responses` : `all ${number(page.judged)} judged responses`,
  left ? `${number(left)} more are not on this page` : "",
  page.malformed ? `${number(page.malformed)} malformed left out` : "",
].filter(Boolean).join(" · ");
$("late").hidden = !page.too_late;
$("command").textContent = page.command;
$("name").value = remembered("thinksafe-review-name", "");
$("tick").style.left = `${100 * page.threshold}%`;
$("band").style.left = `${100 * (page.threshold - page.margin)}%`;
$("band").style.width = `${200 * page.margin}%`;
$("name").addEventListener("change", () => {
  remember("thinksafe-review-name", $("name").value.trim());
  document.querySelector(".who").classList.remove("missing");
});
for (const id of ["order", "only"]) $(id).addEventListener("change", arrange);
$("search").addEventListener("input", arrange);
for (const part of ["prompt", "think", "answer"]) $(part).querySelector(".veil").addEventListener("click", () => uncover([part]));
const actions = {
  a: () => mark("accept"),
  r: () => mark("reject"),
  u: unmark,
  j: () => step(1),
  k: () => step(-1),
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
arrange();
