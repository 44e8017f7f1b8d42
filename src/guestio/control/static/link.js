// The way to the server: requests with the token, and streams of events.

import { parse } from "./format.js";

const STORED = "guestio-token";
const PATIENCE = 5000;
const MOST_PENDING = 1 << 22; // characters of a stream without the end of an event

let token = new URLSearchParams(location.hash.slice(1)).get("token");
if (token) {
  // Out of the address, the history, and what is shown to others.
  history.replaceState(null, "", location.pathname);
  try {
    sessionStorage.setItem(STORED, token);
  } catch { /* it is asked for again after a reload */ }
} else {
  try {
    token = sessionStorage.getItem(STORED);
  } catch { /* no storage, no token */ }
}

export function useToken(text) {
  token = text;
  try {
    sessionStorage.setItem(STORED, text);
  } catch { /* as above */ }
}

export class Refused extends Error {
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

async function ask(target, signal) {
  const answer = await fetch(target, {
    signal,
    cache: "no-store",
    headers: token ? { Authorization: `Bearer ${token}` } : {},
  });
  if (!answer.ok) throw new Refused(answer.status, (await answer.text()).slice(0, 500).trim());
  return answer;
}

export async function get(target) {
  return parse(await (await ask(target, AbortSignal.timeout(PATIENCE))).text());
}

// Server-sent events, as {event, data}, until the signal is aborted or the stream ends.
export async function* events(target, signal) {
  const answer = await ask(target, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      pending += value;
      const parts = pending.split("\n\n");
      pending = parts.pop();
      if (pending.length > MOST_PENDING) throw new Error("an event without an end");
      for (const part of parts) {
        let event = "message";
        let data = "";
        for (const line of part.split("\n")) {
          if (line.startsWith("event: ")) event = line.slice(7);
          else if (line.startsWith("data: ")) data += line.slice(6);
        }
        if (data) yield { event, data: parse(data) };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
