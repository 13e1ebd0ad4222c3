// Votes on their way: kept in this browser until the server has them, each under a key of its own,
// so that one that is sent twice is one vote. They belong to one person: another one who signs in
// in the same browser neither sees nor sends them.

import { Refused, Unreachable, ask } from "./api.js";

const PREFIX = "rlhf-label:vote:";
const WAITS = [1, 2, 4, 8, 15]; // seconds between tries

export function newKey() {
  if (crypto.randomUUID) return crypto.randomUUID(); // only over https and on the own machine
  const hex = [...crypto.getRandomValues(new Uint8Array(16))].map((b) => b.toString(16).padStart(2, "0")).join("");
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})/, "$1-$2-$3-$4-");
}

export class Outbox {
  #prefix;
  #memory = new Map(); // what the browser refuses to keep
  #sending = null; // the key in flight
  #running = false;
  #tries = 0;
  #timer = 0;
  #order = 0;

  // listener: {state(name, waiting, text), sent(vote), refused(vote, error), stopped(error)}
  constructor(owner, listener) {
    this.#prefix = `${PREFIX}${owner}:`;
    this.listener = listener;
    this.keepsAcrossReloads = true;
    window.addEventListener("online", () => this.send());
    document.addEventListener("visibilitychange", () => { if (!document.hidden && this.waiting().length) this.send(); });
    window.addEventListener("beforeunload", (event) => { if (this.#memory.size) event.preventDefault(); });
  }

  // Oldest first.
  waiting() {
    const found = [...this.#memory.values()];
    try {
      for (let place = 0; place < localStorage.length; place++) {
        const name = localStorage.key(place);
        if (name.startsWith(this.#prefix)) found.push(JSON.parse(localStorage.getItem(name)));
      }
    } catch { /* forbidden: then all is in memory */ }
    return found.sort((a, b) => a.at - b.at || a.order - b.order);
  }

  add(vote) {
    const kept = { ...vote, key: newKey(), at: Date.now(), order: this.#order++ };
    try {
      localStorage.setItem(this.#prefix + kept.key, JSON.stringify(kept));
    } catch {
      this.keepsAcrossReloads = false;
      this.#memory.set(kept.key, kept);
    }
    this.send();
    return kept;
  }

  // Take back a vote that has not left yet. False: it is on its way, or gone.
  takeBack(key) {
    if (key === this.#sending || !this.waiting().some((vote) => vote.key === key)) return false;
    this.#forget(key);
    this.#tell(this.waiting().length ? "waiting" : "saved");
    return true;
  }

  // When the vote in flight has arrived or failed.
  async settled() {
    while (this.#sending) await new Promise((go) => setTimeout(go, 15));
  }

  async send() {
    if (this.#running) return;
    this.#running = true;
    clearTimeout(this.#timer);
    try {
      await this.#alone(async () => {
        for (let vote = this.waiting()[0]; vote; vote = this.waiting()[0]) {
          if (!(await this.#sendOne(vote))) return;
          this.#tries = 0;
        }
        this.#tell("saved");
      });
    } finally {
      this.#running = false;
      this.#sending = null;
    }
  }

  async #sendOne(vote) {
    this.#sending = vote.key;
    this.#tell("saving");
    const { task, choice, key, seconds, note, reason } = vote;
    try {
      await ask("/api/votes", { task, choice, key, seconds, note, reason });
    } catch (error) {
      this.#sending = null;
      if (error instanceof Unreachable) return this.#later("offline");
      if (!(error instanceof Refused)) throw error;
      if (error.status >= 500 || error.status === 429) return this.#later("busy", error.wait);
      if (error.status === 401 || error.status === 403) {
        this.#tell("stopped");
        this.listener.stopped(error);
        return false;
      }
      this.#forget(vote.key);
      this.listener.refused(vote, error);
      return true;
    }
    this.#sending = null;
    this.#forget(vote.key);
    this.listener.sent(vote);
    return true;
  }

  #later(why, wait = 0) {
    this.#tell(why);
    const seconds = Math.max(wait, WAITS[Math.min(this.#tries++, WAITS.length - 1)]);
    this.#timer = setTimeout(() => this.send(), seconds * 1000 * (0.8 + 0.4 * Math.random()));
    return false;
  }

  #forget(key) {
    this.#memory.delete(key);
    try { localStorage.removeItem(this.#prefix + key); } catch { /* it was never there */ }
  }

  #tell(state) {
    this.listener.state(state, this.waiting().length);
  }

  // Of several pages of this browser, one sends at a time.
  async #alone(work) {
    if (!navigator.locks) return work();
    return navigator.locks.request(this.#prefix, work);
  }
}
