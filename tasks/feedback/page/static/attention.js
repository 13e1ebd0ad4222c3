// How long a pair was in sight and in focus, in seconds. It survives a reload.

const KEPT = "rlhf-label:seconds";

export class Attention {
  #task = "";
  #seconds = 0;
  #since = null;

  constructor(isCovered) {
    this.isCovered = isCovered;
    for (const [target, kind] of [
      [document, "visibilitychange"], [window, "focus"], [window, "blur"], [window, "pageshow"],
    ]) target.addEventListener(kind, () => this.look());
    window.addEventListener("pagehide", () => { this.#stop(); this.#keep(); });
  }

  start(task) {
    this.#stop();
    this.#task = task;
    this.#seconds = this.#kept(task);
    this.look();
  }

  seconds() {
    const running = this.#since === null ? 0 : (performance.now() - this.#since) / 1000;
    return Math.min(86_400, Math.round((this.#seconds + running) * 1000) / 1000);
  }

  // To be called as well when something covers the pair, or no longer does.
  look() {
    const attends = document.visibilityState === "visible" && document.hasFocus() && !this.isCovered();
    if (!attends) this.#stop();
    else if (this.#since === null) this.#since = performance.now();
  }

  #stop() {
    if (this.#since !== null) this.#seconds += (performance.now() - this.#since) / 1000;
    this.#since = null;
  }

  #keep() {
    try { sessionStorage.setItem(KEPT, JSON.stringify([this.#task, this.#seconds])); } catch { /* full or forbidden */ }
  }

  #kept(task) {
    try {
      const [kept, seconds] = JSON.parse(sessionStorage.getItem(KEPT)) ?? [];
      return kept === task && seconds > 0 ? seconds : 0;
    } catch { return 0; }
  }
}
