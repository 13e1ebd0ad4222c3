// Keys that act: once for each press, never while somebody writes, never with Ctrl, Alt or Meta.

const NAMED = new Set(["ArrowLeft", "ArrowRight", "?"]);

// The letter or digit of a key. Where the layout has other letters (Cyrillic, French digits), the
// place of the key counts.
function nameOf(event) {
  if (NAMED.has(event.key)) return event.key;
  if (/^[a-z0-9]$/i.test(event.key)) return event.key.toLowerCase();
  if (event.shiftKey) return "";
  return /^(?:Key|Digit|Numpad)([A-Z0-9])$/.exec(event.code)?.[1].toLowerCase() ?? "";
}

export function isWriting(target) {
  return target instanceof Element && (target.isContentEditable
    || target.matches("textarea, select, input:not([type=checkbox], [type=radio], [type=button])"));
}

function scrollsSideways(target) {
  const box = target instanceof Element ? target.closest(".table") : null;
  return box !== null && box.scrollWidth > box.clientWidth;
}

// actions: name of the key -> what it does. `isOff()` says that none of them counts now.
export function onKeys(actions, isOff) {
  const held = new Set();
  document.addEventListener("keydown", (event) => {
    // Enter on a button clicks it again and again while it is held.
    if (event.repeat && (event.key === "Enter" || event.key === " ") && event.target.closest?.("button")) {
      event.preventDefault();
    }
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    if (isWriting(event.target) || isOff()) return;
    const name = nameOf(event);
    if (!Object.hasOwn(actions, name)) return;
    const isArrow = name.startsWith("Arrow");
    if (isArrow && (event.shiftKey || scrollsSideways(event.target))) return;
    event.preventDefault();
    const key = event.code || event.key;
    if (event.repeat || held.has(key)) return;
    held.add(key);
    actions[name]();
  });
  document.addEventListener("keyup", (event) => held.delete(event.code || event.key));
  window.addEventListener("blur", () => held.clear());
}
