// Requests to our own server, with the proof that they come from our page.

export class Refused extends Error {
  constructor(status, said, wait) {
    super(said.detail || `The server answers ${status}.`);
    this.status = status;
    this.said = said;
    this.wait = wait; // seconds, if the server says how long
  }
}

export class Unreachable extends Error {}

let csrf = document.querySelector("meta[name=csrf]")?.content ?? "";

export function useProof(fresh) {
  const changed = fresh !== csrf;
  csrf = fresh;
  return changed;
}

const LONGEST = 20_000; // ms

export async function ask(path, body) {
  const headers = { Accept: "application/json" };
  if (body !== undefined) Object.assign(headers, { "Content-Type": "application/json", "X-CSRF-Token": csrf });
  const text = body === undefined ? undefined : JSON.stringify(body);
  let answer, said;
  try {
    answer = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: text,
      keepalive: text !== undefined && text.length < 30_000, // goes on when the page is closed
      redirect: "error",
      signal: AbortSignal.timeout(LONGEST),
    });
    said = answer.status === 204 ? null : await answer.json();
  } catch (error) {
    if (answer && !answer.ok) throw new Refused(answer.status, {}, 0);
    throw new Unreachable(String(error));
  }
  if (!answer.ok) throw new Refused(answer.status, said, Number(answer.headers.get("Retry-After")) || 0);
  return said;
}
