// The page of an annotator: the desk holds the pair that is shown and the next one, so that a vote
// shows the next pair at once and travels in the background.

import { Refused, Unreachable, ask, useProof } from "./api.js";
import { Attention } from "./attention.js";
import { canMark, mark, unmark } from "./differences.js";
import { isWriting, onKeys } from "./keys.js";
import { Outbox, newKey } from "./outbox.js";
import * as view from "./view.js";

const of = (id) => document.getElementById(id);
const settings = of("page").dataset;
const SHORTEST = 500; // ms that a pair is shown before a vote counts
const SHOWN = 40; // ms that the chosen answer is marked before the next pair comes
const POLLS = [15, 30, 60, 120]; // seconds between looks for new pairs
const HEARTBEAT = Math.min(300, Math.max(10, settings.lease / 3)); // seconds
const ACTIVE = 15 * 60; // seconds after which nobody seems to be here
const MOST_BACK = 50; // votes that this page remembers to show them again
const WORDS = {
  left: "answer 1 is better", right: "answer 2 is better", tie: "a tie", both_bad: "both are bad", skip: "skipped",
};

let desk = []; // the first is shown
const gone = new Set(); // tasks that have a vote here
const history = []; // {task, vote}, the newest last
const notes = new Map(); // task -> text
let shownAt = 0;
let busy = false; // a vote or an undo is being shown
let progress = null;
let active = Date.now();
let polls = 0;
let isStranger = false; // somebody else is signed in in this browser by now
let isOver = false; // nothing is left, as far as the server knows

// ---- settings that this browser remembers ----

function remembered(name) {
  try { return localStorage.getItem(`rlhf-label:${name}`) === "yes"; } catch { return false; }
}

function remember(name, isOn) {
  try { localStorage.setItem(`rlhf-label:${name}`, isOn ? "yes" : "no"); } catch { /* not kept */ }
}

let isPlain = remembered("plain"), isMarked = remembered("differences") && canMark;

// ---- what is said ----

function message(text, kind = "wait", key = text) {
  const known = [...of("messages").children].find((note) => note.dataset.key === key);
  if (known) { known.firstChild.textContent = text; return; }
  const note = document.createElement("div");
  note.className = `notice ${kind}`;
  note.dataset.key = key;
  const words = document.createElement("p"), close = document.createElement("button");
  words.textContent = text;
  close.textContent = "Close";
  close.type = "button";
  close.className = "quiet";
  close.onclick = () => note.remove();
  note.append(words, close);
  of("messages").append(note);
}

function unsay(key) {
  for (const note of [...of("messages").children]) if (note.dataset.key === key) note.remove();
}

function say(text) {
  of("last").textContent = text;
  if (of("votes").hidden && text) message(text, "wait", "last"); // its place is out of sight
}

const votes = (count) => `${count} ${count === 1 ? "vote" : "votes"}`;
const wait = (count) => `${votes(count)} ${count === 1 ? "waits" : "wait"} in this browser`;

function showState(state, waiting) {
  const says = {
    saved: "Saved",
    saving: "Saving…",
    waiting: `${votes(waiting)} to save`,
    offline: `Offline, ${votes(waiting)} waiting`,
    busy: `The server is busy, ${votes(waiting)} waiting`,
    stopped: `Not saved: ${votes(waiting)} waiting`,
  };
  of("saved").dataset.state = state;
  of("saved").textContent = says[state];
}

// ---- votes on their way ----

const outbox = new Outbox(settings.owner, {
  state: (name, waiting) => {
    showState(name, waiting);
    if (name === "saved") { unsay("session"); unsay("stopped"); }
  },
  sent: () => {
    count(1);
    fill();
  },
  refused: (vote, error) => {
    const why = error.status === 409
      ? `A vote was not counted (${WORDS[vote.choice]}). ${error.message} Perhaps it was given in another window, or the pair came back to somebody else.`
      : `The server does not accept a vote (${WORDS[vote.choice]}): ${error.message}`;
    message(why, "bad");
    fill();
  },
  stopped: (error) => { shut(error); },
});

// The server lets nobody in, or not us.
async function shut(error) {
  const waiting = outbox.waiting().length;
  const kept = waiting ? ` ${wait(waiting)} until you are signed in again.` : "";
  if (error.status === 401) {
    message(`Your session has ended. Open your invitation link again in this browser, or ask for a new one.${kept}`, "bad", "session");
    watch();
    return;
  }
  if (error.said?.reason === "consent") {
    window.location.assign(error.said.page);
    return;
  }
  if (await signedInAgain(false)) return;
  message(`${error.message}${kept}`, "bad", "stopped");
  setTimeout(() => outbox.send(), 30_000);
}

let watching = 0;
function watch() {
  clearTimeout(watching);
  watching = setTimeout(signedInAgain, 5000);
}

// Whether there is a session of the same person with another proof, as after signing in again in
// another tab: then votes go on.
async function signedInAgain(isWatching = true) {
  try {
    const session = await ask("/api/session");
    isStranger = session.owner !== settings.owner;
    if (isStranger) {
      desk = [];
      nothing("stopped");
      message("Somebody else is signed in in this browser now. Reload the page to go on as that person; votes of yours that wait here are kept for you.", "bad", "session");
      return true;
    }
    if (!useProof(session.csrf) && !isWatching) return false;
    outbox.send();
    unsay("session");
    fill();
    return true;
  } catch (error) {
    if (isWatching && !(error instanceof Refused && error.status === 403)) watch();
    return false;
  }
}

// ---- the desk ----

let filling = null, again = false;

// Ask for what is on the desk. Several wishes while one is under way are one more.
function fill() {
  if (filling) again = true;
  else filling = fillAll().finally(() => { filling = null; });
  return filling;
}

async function fillAll() {
  do {
    again = false;
    await fillOnce();
  } while (again);
}

async function fillOnce() {
  if (isStranger) return;
  const settled = outbox.waiting().length === 0;
  let found;
  try {
    found = await ask("/api/tasks");
  } catch (error) {
    if (error instanceof Refused && (error.status === 401 || error.status === 403)) {
      if (!desk.length) nothing("stopped");
      shut(error);
    } else {
      if (!desk.length) nothing("offline");
      later();
    }
    return;
  }
  if (busy) await new Promise((go) => setTimeout(go, SHOWN));
  const fresh = found.tasks.filter((task) => !gone.has(task.task));
  const shown = view.current();
  const isHere = shown && fresh.some((task) => task.task === shown.task);
  if (shown && !isHere && settled && !gone.has(shown.task) && !notes.get(shown.task)) {
    message("The pair that was here has gone back to the queue, as you were away for long, or it has a vote already. Here is another one.", "wait", "away");
    desk = fresh;
  } else {
    desk = shown && !gone.has(shown.task) ? [shown, ...fresh.filter((task) => task.task !== shown.task)] : fresh;
  }
  if (!desk.length) {
    nothing(found.paused ? "paused" : "finished");
    later();
    return;
  }
  polls = 0;
  if (view.current()?.task !== desk[0].task) show(desk[0]);
}

let timer = 0;
function later() {
  clearTimeout(timer);
  timer = setTimeout(() => (document.hidden ? later() : fill()), 1000 * POLLS[Math.min(polls++, POLLS.length - 1)]);
}

function paragraphs(title, ...texts) {
  const heading = document.createElement("h1");
  heading.textContent = title;
  return [heading, ...texts.filter(Boolean).map((text) => Object.assign(document.createElement("p"), { textContent: text }))];
}

function nothing(why) {
  const waiting = outbox.waiting().length;
  const count = progress?.done ?? 0;
  const thanks = count ? `You have compared ${count.toLocaleString("en")} ${count === 1 ? "pair" : "pairs"}. Thank you!` : "";
  const looks = "This page looks for new pairs by itself.";
  const drawn = {
    offline: () => paragraphs("No connection", waiting && `${wait(waiting)} until the connection is back.`, "New pairs come then too. You may leave the page open."),
    paused: () => paragraphs("Labelling is paused", thanks, `It goes on when the people who run it say so. ${looks}`),
    stopped: () => paragraphs("No pairs for now", looks),
    finished: () => (count
      ? paragraphs("Nothing left for now", thanks, `Come back later, or leave the page open. ${looks}`)
      : paragraphs("No pairs yet", `There is nothing to compare at the moment. ${looks}`)),
  }[why]();
  if (waiting && why !== "offline") drawn.push(...paragraphs("", `Still to be saved: ${votes(waiting)}.`).slice(1));
  if (count && why !== "stopped") drawn.push(undoButton());
  view.drawNothing(drawn);
  of("nothing").dataset.why = why;
  isOver = why === "finished";
  showProgress();
}

function undoButton() {
  const button = document.createElement("button");
  button.type = "button";
  button.append("Undo the last vote ", Object.assign(document.createElement("kbd"), { textContent: "U" }));
  button.onclick = undo;
  return button;
}

function show(task) {
  unsay("last");
  if (isOver) {
    isOver = false;
    readProgress();
  }
  view.chosen(null);
  draw(task);
  closeNote();
  of("note-text").value = notes.get(task.task) ?? "";
  markNote();
  window.scrollTo(0, 0);
  attention.start(task.task);
  shownAt = performance.now();
  document.body.dataset.task = task.task;
}

function draw(task) {
  view.draw(task, isPlain);
  unmark();
  unsay("differences");
  if (isMarked) {
    const says = mark(of("left"), of("right"));
    if (says) say(says);
  }
}

// ---- progress ----

function midnight() {
  const now = new Date();
  return new Date(now.getFullYear(), now.getMonth(), now.getDate()).toISOString();
}

async function readProgress() {
  try {
    progress = await ask(`/api/progress?since=${encodeURIComponent(midnight())}`);
    showProgress();
    if (!desk.length && of("nothing").dataset.why) nothing(of("nothing").dataset.why);
  } catch { /* the numbers stay as they are */ }
}

function count(change) {
  if (!progress) return;
  progress.done += change;
  progress.today = Math.max(0, progress.today + change);
  if (!progress.more) progress.left = Math.max(0, progress.left - change);
  showProgress();
  if (!desk.length && !of("nothing").hidden && of("nothing").dataset.why) nothing(of("nothing").dataset.why);
}

function showProgress() {
  if (!progress) return;
  const { done, today, left, more } = progress;
  const number = (value) => value.toLocaleString("en");
  const about = more ? "more than " : left > 20 ? "about " : "";
  const rest = left ? `${about}${number(left)} left` : "the last ones";
  of("progress").textContent = `${number(today)} today · ${number(done)} in all · ${isOver ? "none left" : rest}`;
  of("bar").max = Math.max(1, done + left);
  of("bar").value = done;
}

// ---- what an annotator does ----

const attention = new Attention(() => of("help").open || of("skip").open);

function isEarly() {
  if (performance.now() - shownAt >= SHORTEST) return false;
  say("That was very quick: look at this pair first.");
  return true;
}

function choose(choice, reason = "") {
  const task = view.current();
  if (!task || busy || isEarly()) return;
  const note = (notes.get(task.task) ?? "").trim();
  if (noteIsTooLong(note)) { openNote(); return; }
  busy = true;
  active = Date.now();
  const vote = outbox.add({ task: task.task, choice, seconds: attention.seconds(), note, reason });
  gone.add(task.task);
  history.push({ task, vote });
  if (history.length > MOST_BACK) history.shift();
  if (!outbox.keepsAcrossReloads) message("This browser keeps no data for this page: leave it open until everything is saved.", "wait");
  unsay("away");
  light(choice);
  view.chosen(choice);
  say(`Last: ${WORDS[choice]}.`);
  setTimeout(next, choice === "skip" ? 0 : SHOWN);
}

function next() {
  busy = false;
  desk = desk.filter((task) => !gone.has(task.task));
  if (desk.length) show(desk[0]);
  else if (["offline", "busy", "stopped"].includes(of("saved").dataset.state)) nothing("offline");
  else {
    view.drawNothing(paragraphs("", "Loading…").slice(1));
    of("nothing").dataset.why = "";
  }
  if (desk.length < 2) fill();
}

function light(choice) {
  for (const button of document.querySelectorAll(".choice")) {
    button.classList.remove("lit");
    if (button.dataset.choice !== choice) continue;
    void button.offsetWidth; // begins the animation anew
    button.classList.add("lit");
  }
}

async function undo() {
  if (busy) return;
  busy = true;
  say("Taking the last vote back…");
  try {
    const last = history.at(-1);
    const waits = outbox.waiting().at(-1);
    if (waits && outbox.takeBack(waits.key)) {
      back(last?.vote.key === waits.key ? last.task : null, waits);
      return;
    }
    await outbox.settled();
    if (outbox.waiting().length) {
      say("The last vote is on its way; try again in a moment.");
      return;
    }
    const found = await undoOnServer(newKey());
    if (!found.undone) { say("There is nothing to undo."); return; }
    count(-1);
    const task = found.tasks[0];
    desk = found.tasks;
    back(task, last && last.task.task === task?.task ? last.vote : null);
  } catch (error) {
    if (error instanceof Refused && (error.status === 401 || error.status === 403)) shut(error);
    say(error instanceof Unreachable ? "No connection: the last vote could not be taken back." : error.message);
  } finally {
    busy = false;
  }
}

async function undoOnServer(key) {
  for (let tries = 0; ; tries++) {
    try {
      return await ask("/api/undo", { key }); // the same key: sent twice, it takes back one vote
    } catch (error) {
      if (!(error instanceof Unreachable) || tries === 2) throw error;
      await new Promise((go) => setTimeout(go, 400 * (tries + 1)));
    }
  }
}

function back(task, vote) {
  if (vote) gone.delete(vote.task);
  if (vote && history.at(-1)?.vote.key === vote.key) history.pop();
  if (task) {
    gone.delete(task.task);
    desk = [task, ...desk.filter((other) => other.task !== task.task)];
    if (vote?.note) notes.set(task.task, vote.note);
    show(task);
  }
  say(vote ? `Taken back. You had said: ${WORDS[vote.choice]}.` : "Taken back: here it is again.");
  fill();
}

// ---- note ----

function openNote() {
  of("note").hidden = false;
  of("note-button").setAttribute("aria-expanded", "true");
  of("note-text").focus();
}

function closeNote() {
  if (of("note").contains(document.activeElement)) of("main").focus({ preventScroll: true });
  of("note").hidden = true;
  of("note-button").setAttribute("aria-expanded", "false");
}

function markNote() {
  const text = of("note-text").value.trim();
  of("note-button").classList.toggle("has-note", text !== "");
  noteIsTooLong(text);
}

function noteIsTooLong(text) {
  const most = Number(settings.longestNote), length = [...text].length;
  of("note-problem").textContent = length > most ? `The note has ${length.toLocaleString("en")} characters; at most ${most.toLocaleString("en")} are kept. Please make it shorter.` : "";
  return length > most;
}

of("note-text").addEventListener("input", () => {
  const task = view.current();
  if (task) notes.set(task.task, of("note-text").value);
  markNote();
});
of("note-text").addEventListener("keydown", (event) => {
  if (event.key === "Escape" || (event.key === "Enter" && (event.ctrlKey || event.metaKey))) closeNote();
});
of("note-button").addEventListener("click", () => (of("note").hidden ? openNote() : closeNote()));

// ---- skip and help ----

function open(id) {
  if (document.querySelector("dialog[open]")) return;
  of(id).showModal();
  attention.look();
}

function openSkip() {
  if (view.current() && !busy && !isEarly()) open("skip");
}

function skip(reason) {
  of("skip").close();
  of("skip-text").value = "";
  choose("skip", reason);
}

for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("close", () => attention.look());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  for (const button of dialog.querySelectorAll("[data-close]")) button.addEventListener("click", () => dialog.close());
}
for (const button of document.querySelectorAll(".reason")) button.addEventListener("click", () => skip(button.dataset.reason));
of("skip").addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || isWriting(event.target)) return;
  const place = Number(/^(?:Digit|Numpad)([1-9])$/.exec(event.code)?.[1] ?? event.key);
  const button = document.querySelectorAll(".reason")[place - 1];
  if (button) { event.preventDefault(); skip(button.dataset.reason); }
});
of("skip-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const reason = of("skip-text").value.trim();
  if (reason) skip(reason);
  else of("skip-text").focus();
});

// ---- views ----

function setPlain(isOn) {
  isPlain = isOn;
  remember("plain", isOn);
  of("plain").setAttribute("aria-pressed", String(isOn));
  if (view.current()) draw(view.current());
}

function setMarked(isOn) {
  isMarked = isOn;
  remember("differences", isOn);
  of("differences").setAttribute("aria-pressed", String(isOn));
  if (view.current()) draw(view.current());
  if (!isOn) say("");
}

of("plain").addEventListener("click", () => setPlain(!isPlain));
of("differences").addEventListener("click", () => setMarked(!isMarked));
of("differences").hidden = !canMark;
of("plain").setAttribute("aria-pressed", String(isPlain));
of("differences").setAttribute("aria-pressed", String(isMarked));

// ---- keys and buttons ----

const left = () => choose("left"), right = () => choose("right");
onKeys({
  1: left, ArrowLeft: left, 2: right, ArrowRight: right,
  t: () => choose("tie"), b: () => choose("both_bad"), s: openSkip, u: undo,
  n: () => { if (view.current()) openNote(); },
  p: () => setPlain(!isPlain),
  d: () => { if (canMark) setMarked(!isMarked); },
  a: () => { if (view.current()) view.goToAnswers(); },
  "?": () => open("help"),
}, () => document.querySelector("dialog[open]") !== null);

for (const button of document.querySelectorAll(".choice")) button.addEventListener("click", () => choose(button.dataset.choice));
of("skip-button").addEventListener("click", openSkip);
of("undo").addEventListener("click", undo);
of("help-button").addEventListener("click", () => open("help"));
of("leave").addEventListener("click", async () => {
  const waiting = outbox.waiting().length;
  if (waiting && !window.confirm(`Not saved yet: ${votes(waiting)}. What is not saved stays in this browser until you sign in again here. Sign out?`)) return;
  try {
    window.location.assign((await ask("/leave", {})).to);
  } catch (error) { message(error instanceof Unreachable ? "No connection: you are still signed in." : error.message, "bad"); }
});

// ---- being here, being away ----

for (const kind of ["keydown", "pointerdown", "wheel", "touchmove"]) {
  document.addEventListener(kind, () => { active = Date.now(); }, { passive: true });
}
setInterval(() => {
  if (!document.hidden && desk.length && Date.now() - active < ACTIVE * 1000) fill(); // the lease goes on
}, HEARTBEAT * 1000);
setInterval(() => { if (!document.hidden && !outbox.waiting().length) readProgress(); }, 300_000);
document.addEventListener("visibilitychange", () => { if (!document.hidden) { active = Date.now(); fill(); } });
window.addEventListener("online", () => fill());

for (const vote of outbox.waiting()) gone.add(vote.task);
showState(outbox.waiting().length ? "waiting" : "saved", outbox.waiting().length);
outbox.send();
fill();
readProgress();
