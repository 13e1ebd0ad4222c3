// What a button says when it has made a link: the link once, with a button to copy it.
"use strict";

const dialog = document.getElementById("link");
const text = document.getElementById("link-text");
const said = document.getElementById("link-said");

document.addEventListener("said", (event) => {
  if (!event.detail.link) return;
  text.value = event.detail.link;
  said.textContent = "";
  dialog.showModal();
  text.select();
});

document.getElementById("link-copy").addEventListener("click", async () => {
  text.select();
  try {
    await navigator.clipboard.writeText(text.value);
    said.textContent = "Copied.";
  } catch {
    // Browsers give the clipboard to pages over https and on this machine only.
    said.textContent = document.execCommand("copy") ? "Copied." : "Press Ctrl-C to copy it.";
  }
});

document.getElementById("link-close").addEventListener("click", () => dialog.close());
dialog.addEventListener("close", () => { text.value = ""; window.location.reload(); });
