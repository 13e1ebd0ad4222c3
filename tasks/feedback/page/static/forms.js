// Forms that go as JSON: <form data-json action=... method=post>. The server answers with
// {"to": PAGE}, {"reload": true}, something for the event "said", or {"detail": WHAT WENT WRONG}.
"use strict";

const csrf = document.querySelector("meta[name=csrf]")?.content ?? "";

function contentOf(form) {
  const content = {};
  for (const field of form.elements) {
    if (!field.name) continue;
    if (field.type === "checkbox") content[field.name] = field.checked;
    else if (field.type === "number") content[field.name] = field.valueAsNumber;
    else content[field.name] = field.value;
  }
  return content;
}

async function send(form) {
  const answer = await fetch(form.action, {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-CSRF-Token": csrf },
    body: JSON.stringify(contentOf(form)),
  });
  const said = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(said.detail || `The server answers ${answer.status}.`);
  return said;
}

document.addEventListener("submit", async (event) => {
  const form = event.target;
  if (!form.matches("form[data-json]")) return;
  event.preventDefault();
  if (form.dataset.ask && !window.confirm(form.dataset.ask)) return;
  const problem = form.querySelector("[role=alert]");
  const buttons = form.querySelectorAll("button");
  if (problem) problem.textContent = "";
  buttons.forEach((button) => { button.disabled = true; });
  try {
    const said = await send(form);
    form.dispatchEvent(new CustomEvent("said", { bubbles: true, detail: said }));
    if (said.to) { window.location.replace(said.to); return; }
    if (said.reload) { window.location.reload(); return; }
  } catch (error) {
    const text = error instanceof TypeError
      ? "The server cannot be reached; try again in a moment." : error.message;
    if (problem) problem.textContent = text; else window.alert(text);
  }
  buttons.forEach((button) => { button.disabled = false; });
});
