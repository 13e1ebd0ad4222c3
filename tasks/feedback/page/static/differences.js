// The words in which two texts differ, as highlights: the page itself stays as it is.

const NAME = "differs";
const WORD = /[\p{L}\p{N}\p{M}_]+|[^\s\p{L}\p{N}\p{M}_]/gu;
const MOST_EDITS = 1500; // beyond it, two texts have little in common
const LEAST_COMMON = 0.25; // of the words

export const canMark = typeof CSS !== "undefined" && "highlights" in CSS && typeof Highlight === "function";

export function unmark() {
  if (canMark) CSS.highlights.delete(NAME);
}

// Returns what is to be said about it; empty if there is nothing to say.
export function mark(left, right) {
  unmark();
  const a = wordsOf(left), b = wordsOf(right);
  const common = alignment(a.map((word) => word.text), b.map((word) => word.text));
  if (!common || common.length < LEAST_COMMON * Math.max(a.length, b.length)) {
    return "The answers have too little in common to mark differences.";
  }
  if (common.length === a.length && common.length === b.length) return "The words of both answers are the same.";
  const highlight = new Highlight();
  for (const [words, side] of [[a, 0], [b, 1]]) {
    const same = new Set(common.map((pair) => pair[side]));
    words.forEach((word, place) => { if (!same.has(place)) highlight.add(word.range()); });
  }
  CSS.highlights.set(NAME, highlight);
  return "";
}

function wordsOf(root) {
  const found = [];
  const texts = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  for (let node = texts.nextNode(); node; node = texts.nextNode()) {
    for (const match of node.data.matchAll(WORD)) {
      const [from, to, of] = [match.index, match.index + match[0].length, node];
      found.push({
        text: match[0],
        range() { const r = new Range(); r.setStart(of, from); r.setEnd(of, to); return r; },
      });
    }
  }
  return found;
}

// Places of a longest common subsequence (Myers 1986); null if it takes too many edits.
function alignment(a, b) {
  let start = 0, end = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start++;
  while (end < a.length - start && end < b.length - start && a[a.length - 1 - end] === b[b.length - 1 - end]) end++;
  const middle = myers(a.slice(start, a.length - end), b.slice(start, b.length - end));
  if (!middle) return null;
  const pairs = Array.from({ length: start }, (_, place) => [place, place]);
  pairs.push(...middle.map(([x, y]) => [x + start, y + start]));
  for (let back = end; back > 0; back--) pairs.push([a.length - back, b.length - back]);
  return pairs;
}

function myers(a, b) {
  const most = Math.min(a.length + b.length, MOST_EDITS);
  const reach = new Int32Array(2 * most + 3), trace = [];
  for (let edits = 0; edits <= most; edits++) {
    trace.push(reach.slice(most - edits, most + edits + 3));
    for (let k = -edits; k <= edits; k += 2) {
      const at = k + most + 1;
      let x = k === -edits || (k !== edits && reach[at - 1] < reach[at + 1]) ? reach[at + 1] : reach[at - 1] + 1;
      let y = x - k;
      while (x < a.length && y < b.length && a[x] === b[y]) { x++; y++; }
      reach[at] = x;
      if (x >= a.length && y >= b.length) return walkBack(a, b, trace);
    }
  }
  return null;
}

function walkBack(a, b, trace) {
  const pairs = [];
  let x = a.length, y = b.length;
  for (let edits = trace.length - 1; edits >= 0; edits--) {
    const reach = trace[edits], k = x - y;
    const of = (diagonal) => reach[diagonal + edits + 1];
    const before = k === -edits || (k !== edits && of(k - 1) < of(k + 1)) ? k + 1 : k - 1;
    const fromX = edits ? of(before) : 0, fromY = edits ? fromX - before : 0;
    while (x > fromX && y > fromY && x > 0 && y > 0) { x--; y--; pairs.push([x, y]); }
    x = fromX;
    y = fromY;
  }
  return pairs.reverse();
}
