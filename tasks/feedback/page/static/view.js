// A pair on the screen: both views of its texts, and how much of it is below the fold.

const SIDES = ["left", "right"];
const of = (id) => document.getElementById(id);

let shown = null;

// The server has cleaned the HTML; the policy of the page stops what it would have missed.
export function draw(task, isPlain) {
  shown = task;
  const view = isPlain ? "plain" : "markdown";
  for (const part of ["prompt", ...SIDES]) of(part).innerHTML = task[part][view];
  for (const link of of("pair").querySelectorAll(".text a")) link.setAttribute("rel", "noopener noreferrer nofollow");
  for (const table of of("pair").querySelectorAll(".table")) letScroll(table);
  of("pair").hidden = of("votes").hidden = false;
  of("nothing").hidden = true;
  measureFolds();
}

// A table that is too wide can be scrolled by keyboard as well.
function letScroll(table) {
  if (table.scrollWidth <= table.clientWidth) return;
  table.tabIndex = 0;
  table.setAttribute("role", "region");
  table.setAttribute("aria-label", "Wide table");
}

export function drawNothing(html) {
  shown = null;
  of("pair").hidden = of("votes").hidden = true;
  of("nothing").hidden = false;
  of("nothing").replaceChildren(...html);
}

export const current = () => shown;

export function chosen(choice) {
  const sides = { left: ["left"], right: ["right"], tie: SIDES, both_bad: SIDES }[choice] ?? [];
  for (const side of SIDES) of(`answer-${side}`).classList.toggle("chosen", sides.includes(side));
}

// ---- what is below the fold ----

const AT_LEAST = 6; // pixels

function measureFolds() {
  if (!shown) return;
  const edge = of("votes").querySelector(".inside").getBoundingClientRect().top;
  const boxes = SIDES.map((side) => of(side).getBoundingClientRect());
  const isStacked = boxes[1].top >= boxes[0].bottom;
  SIDES.forEach((side, place) => {
    const box = boxes[place], number = place + 1;
    const hidden = box.bottom - edge;
    let says = "";
    if (box.top > edge) says = isStacked && place ? "Answer 2 is further down" : `Answer ${number} is further down`;
    else if (hidden > AT_LEAST) {
      const lines = Math.ceil(hidden / (parseFloat(getComputedStyle(of(side)).lineHeight) || 24));
      says = `Answer ${number}: ${lines.toLocaleString("en")} more ${lines === 1 ? "line" : "lines"}`;
    }
    if (isStacked && place === 1 && boxes[0].bottom - edge > AT_LEAST) says = ""; // one at a time
    const fold = of(`fold-${side}`);
    if (fold.dataset.says === says) return;
    fold.dataset.says = says;
    fold.hidden = !says;
    fold.textContent = says && `${says} ↓`;
  });
}

export function goOn() {
  const behavior = matchMedia("(prefers-reduced-motion: reduce)").matches ? "instant" : "smooth";
  const visible = of("votes").getBoundingClientRect().top;
  window.scrollBy({ top: Math.max(120, visible * 0.85), behavior });
}

export function goToAnswers() {
  of("answer-left").scrollIntoView({ block: "start" });
}

let planned = false;
function plan() {
  if (planned) return;
  planned = true;
  requestAnimationFrame(() => { planned = false; measureFolds(); });
}
window.addEventListener("scroll", plan, { passive: true });
window.addEventListener("resize", plan);
const sizes = new ResizeObserver(plan);
for (const id of ["pair", "votes"]) sizes.observe(of(id));
for (const side of SIDES) of(`fold-${side}`).addEventListener("click", goOn);
