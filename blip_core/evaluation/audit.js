"use strict";
// One pair at a time, marked by a key. What was marked, and in which order, is kept in this browser under the sample's
// name, and comes out as a file. Nothing here makes markup of anything.

const main = document.querySelector("main");
const cards = [...document.querySelectorAll("article")];
const MARKS = ["right", "wrong", "unsure"];
const KEYS = {
  r: "right", w: "wrong", u: "unsure", z: "undo", backspace: "undo",
  arrowleft: "back", arrowright: "on", d: "download",
};
const STORED = `capfilt-audit-${main.dataset.sample}`;

let state = load();
let shown = nextOpen(-1);

function isMarks(value) {
  return typeof value === "object" && value !== null && Object.entries(value).every(
    ([number, mark]) => /^\d+$/.test(number) && number >= 1 && number <= cards.length && MARKS.includes(mark));
}

// What this browser kept, where it is what this page would keep; other pages may write there too.
function load() {
  try {
    const kept = JSON.parse(localStorage.getItem(STORED));
    if (kept && isMarks(kept.answers) && Array.isArray(kept.history)) {
      return { answers: kept.answers, history: kept.history.filter(
        (step) => Array.isArray(step) && cards[step[0] - 1] && (step[1] === null || MARKS.includes(step[1]))) };
    }
  } catch { /* nothing can be kept here, or what was kept is torn: begun anew */ }
  return { answers: {}, history: [] };
}

function save() {
  let told = "The answers are saved in this browser.";
  try {
    localStorage.setItem(STORED, JSON.stringify(state));
  } catch {
    told = "This browser saves nothing for this page: download the answers before you close it.";
  }
  document.getElementById("saved").textContent = told;
}

// The next pair after a place without a mark, from the first one again; the place itself where all are marked.
function nextOpen(place) {
  for (let step = 1; step <= cards.length; step += 1) {
    const candidate = (place + step) % cards.length;
    if (!(candidate + 1 in state.answers)) return candidate;
  }
  return Math.max(place, 0);
}

function set(number, mark) {
  if (mark === null) delete state.answers[number];
  else state.answers[number] = mark;
}

function mark(name) {
  const number = shown + 1;
  state.history.push([number, state.answers[number] ?? null]);
  set(number, name);
  save();
  shown = nextOpen(shown);
}

function undo() {
  const step = state.history.pop();
  if (!step) return;
  set(...step);
  save();
  shown = step[0] - 1;
}

function download() {
  const { schema, sample, round, seed, pairs } = main.dataset;
  const answers = { schema, sample, round: +round, seed: +seed, pairs: +pairs, answers: state.answers };
  const url = URL.createObjectURL(new Blob([JSON.stringify(answers, null, 1)], { type: "application/json" }));
  const link = document.createElement("a");
  link.href = url;
  link.download = `capfilt-audit-${sample}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

function show() {
  const marks = Object.values(state.answers);
  const counts = MARKS.map((name) => `${marks.filter((given) => given === name).length} ${name}`);
  document.getElementById("progress").value = marks.length;
  document.getElementById("counts").textContent = `${marks.length} of ${cards.length} marked: ${counts.join(", ")}`;
  cards.forEach((card, place) => { card.hidden = place !== shown; });
  const card = cards[shown];
  if (!card) return;
  const given = state.answers[shown + 1] ?? "";
  card.dataset.mark = given;
  card.querySelector(".mark").textContent = given;
}

function act(action) {
  if (MARKS.includes(action) && cards.length) mark(action);
  if (action === "undo") undo();
  if (action === "back") shown = Math.max(shown - 1, 0);
  if (action === "on") shown = Math.min(shown + 1, cards.length - 1);
  if (action === "download") download();
  show();
}

document.addEventListener("keydown", (event) => {
  const action = KEYS[event.key.toLowerCase()];
  if (!action || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  const moves = action === "back" || action === "on";
  if (moves || !event.repeat) act(action); // a key that is held down marks one pair
});
document.querySelector("nav").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  button.blur();
  act(button.dataset.action);
});
window.addEventListener("storage", (event) => { // marked in another window
  if (event.key !== STORED) return;
  state = load();
  show();
});
show();
