// The control API from a browser: connect's JSON over fetch, unary and server streams.

const service = "/api/coppice.api.v1.Control/";
const key = "coppice-token";

export class Refused extends Error {}

export const token = {
  get: () => sessionStorage.getItem(key),
  set: (t) => sessionStorage.setItem(key, t),
  clear: () => sessionStorage.removeItem(key),
};

function post(method, type, body, signal) {
  return fetch(service + method, {
    method: "POST", body, signal, cache: "no-store", referrerPolicy: "no-referrer",
    headers: { "Content-Type": type, "Connect-Protocol-Version": "1", Authorization: "Bearer " + token.get() },
  });
}

async function fail(res) {
  let why = res.statusText || String(res.status);
  try { why = (await res.json()).message || why; } catch { /* no JSON: the status says it */ }
  throw res.status === 401 ? new Refused(why) : new Error(why);
}

export async function call(method, request = {}, signal) {
  const res = await post(method, "application/json", JSON.stringify(request), signal);
  return res.ok ? res.json() : fail(res);
}

// stream yields the messages of a server stream: frames of a flag byte, a length of four and JSON; flag 2 ends it.
export async function* stream(method, request = {}, signal) {
  const json = new TextEncoder().encode(JSON.stringify(request));
  const frame = new Uint8Array(5 + json.length);
  new DataView(frame.buffer).setUint32(1, json.length);
  frame.set(json, 5);
  const res = await post(method, "application/connect+json", frame, signal);
  if (!res.ok) await fail(res);
  const reader = res.body.getReader();
  let buf = new Uint8Array(0);
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the stream broke off");
    const next = new Uint8Array(buf.length + value.length);
    next.set(buf); next.set(value, buf.length);
    buf = next;
    while (buf.length >= 5) {
      const size = new DataView(buf.buffer, buf.byteOffset).getUint32(1);
      if (buf.length < 5 + size) break;
      const flag = buf[0];
      const msg = JSON.parse(new TextDecoder().decode(buf.subarray(5, 5 + size)));
      buf = buf.slice(5 + size);
      if (flag & 2) {
        if (!msg.error) return;
        throw msg.error.code === "unauthenticated" ? new Refused(msg.error.message) : new Error(msg.error.message);
      }
      yield msg;
    }
  }
}
