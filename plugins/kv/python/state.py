"""The state: an ordered map, the answers that were given, and a journal of both.

It travels in the encoding of the Go SDK (plugins/sdk/statev1/state.proto), so a component in Go may be swapped for this one and back. Everything here
runs on the event loop's thread and never waits in the middle of a transaction: that is what makes a call one transaction.
"""

import asyncio
import bisect
import collections
import struct
import time

import grpc
import xxhash

import component_pb2 as contract
import state_pb2 as wire

CHUNK = 256 << 10  # bytes of data in a frame
DEDUPE_BYTES = 64 << 20  # of remembered answers; a full table refuses new keyed calls
JOURNAL_BYTES = 32 << 20  # of entries kept for those who follow
KEY_AGE, CALLER_AGE = 600.0, 86400.0  # seconds that a plain key, and a silent caller's numbered ones, are remembered
FORGET_BATCH = 64  # aged keys that one commit lets go of
OVERHEAD = 160  # bytes that a remembered answer costs besides its own
MAX_KEY = 64 << 10

Code = grpc.StatusCode


class Refused(Exception):
    """A call that has not happened: nothing of it is in the state, and nothing of it is remembered."""

    def __init__(self, code, text, trailers=()):
        super().__init__(text)
        self.code, self.text, self.trailers = code, text, tuple(trailers)


def digest(frame):
    """The xxh64 of a frame, as component.proto defines it."""
    section = frame.section.encode()
    h = xxhash.xxh64()
    h.update(struct.pack("<QIQQQBBI", frame.mark, frame.schema, frame.total_bytes, frame.since_mark, frame.offset,
                         frame.deleted, frame.last, len(section)))
    h.update(section)
    h.update(frame.data)
    return h.intdigest()


def sealed(**fields):
    frame = contract.StateFrame(**fields)
    frame.xxh64 = digest(frame)
    return frame


def varint(n):
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    out.append(n)
    return bytes(out)


def parse_key(key):
    """Splits "<caller>/<n>" into (caller, n); any other text, also a number with a sign or leading zeros, is (key, None)."""
    caller, slash, n = key.rpartition(b"/")
    if slash and caller and n.isdigit() and (n == b"0" or n[:1] != b"0") and int(n) < 1 << 64:
        return caller, int(n)
    return key, None


class Txn:
    """One transaction. It writes into the store at once and can take that back: nobody else runs meanwhile."""

    def __init__(self, store, read_only):
        self.store, self.read_only = store, read_only
        self.undo, self.writes = [], {}

    def get(self, key):
        return self.store.values.get(key)

    def __len__(self):
        return len(self.store.values)

    def put(self, key, value):
        self._write(key, value)

    def delete(self, key):
        """Says whether the key was there."""
        if key not in self.store.values:
            return False
        self._write(key, None)
        return True

    def scan(self, prefix, after):
        """The pairs whose key begins with prefix and is greater than after, in order."""
        keys = self.store.keys
        at = bisect.bisect_left(keys, prefix)
        if after:
            at = max(at, bisect.bisect_right(keys, after))
        while at < len(keys) and keys[at].startswith(prefix):
            yield keys[at], self.store.values[keys[at]]
            at += 1

    def _write(self, key, value):
        if self.read_only:
            raise Refused(Code.INTERNAL, "write in a read-only transaction: a method declared free of side effects must not change state")
        self.undo.append((key, self.store.values.get(key)))
        self.writes[key] = value
        self.store.set(key, value)

    def roll_back(self):
        for key, old in reversed(self.undo):
            self.store.set(key, old)
        self.undo, self.writes = [], {}


class Store:
    """The state of one instance."""

    def __init__(self, schema):
        self.schema, self.mark = schema, 0
        self.values, self.keys = {}, []  # the map, and its keys in order
        self.replies = {}  # key of a call -> wire.Reply
        self.numbers = {}  # caller -> the numbers of its remembered calls, in order
        self.lows = {}  # caller -> low-water mark
        self.next_call = 1
        self.dedupe_bytes = 0
        self.seen = {False: collections.OrderedDict(), True: collections.OrderedDict()}  # plain keys, callers -> when; oldest first
        self._reset_journal()

    # The map.

    def set(self, key, value):
        if value is None:
            if self.values.pop(key, None) is not None:
                del self.keys[bisect.bisect_left(self.keys, key)]
            return
        if key not in self.values:
            bisect.insort(self.keys, key)
        self.values[key] = value

    # Calls and their answers.

    def remembered(self, key, fingerprint):
        """The answer that was given for this key; None: the call is new. Refused: it must not run."""
        if len(key) > MAX_KEY:
            raise Refused(Code.RESOURCE_EXHAUSTED, f"an idempotency key of {len(key)} bytes, at most {MAX_KEY}")
        if self.backlog() > JOURNAL_BYTES and key not in self.replies:
            raise Refused(Code.UNAVAILABLE, "journal entries wait to be copied elsewhere and the bound is reached: try again")
        if not key:
            return None
        caller, n = parse_key(key)
        if n is not None and n < self.lows.get(caller, 0):
            raise Refused(Code.FAILED_PRECONDITION, "the key is below its caller's low-water mark: the caller said that it has the answer, so it was let go")
        reply = self.replies.get(key)
        if reply is None:
            if self.dedupe_bytes >= DEDUPE_BYTES and not self._aged(False, 1) and not self._aged(True, 1):
                raise Refused(Code.RESOURCE_EXHAUSTED, "the table of remembered replies is full: let callers advance their low-water mark")
            return None
        self._touch(key)
        if reply.fingerprint != fingerprint or reply.http_status:
            raise Refused(Code.ABORTED, "the key was used before for a different request: use a new key for each request", [("x-coppice-key-reused", "1")])
        return reply

    def commit(self, txn, key=b"", low=0, fingerprint=0, body=b""):
        """Makes the transaction, and for a keyed call its answer, one journal entry; returns the mark that holds it."""
        if not key and not txn.writes:
            return self.mark
        entry = wire.Entry(mark=self.mark + 1, schema=self.schema)
        for k, v in txn.writes.items():
            if v is None:
                entry.ops.add(key=k, delete=True)
            else:
                entry.ops.add(key=k, value=v)
        if key:
            caller, n = parse_key(key)
            entry.forget_keys.extend(self._aged(False, FORGET_BATCH))
            entry.forget_callers.extend(self._aged(True, FORGET_BATCH))
            if n is not None and low > self.lows.get(caller, 0):
                entry.low.caller, entry.low.n = caller, low
            entry.reply.key, entry.reply.fingerprint, entry.reply.body = key, fingerprint, body
        self._apply_dedupe(entry)
        self.mark = entry.mark
        encoded = entry.SerializeToString(deterministic=True)
        self.journal.append((entry.mark, entry.schema, encoded))
        self.journal_bytes += len(encoded)
        self._trim()
        self._wake()
        txn.undo, txn.writes = [], {}
        return self.mark

    def _apply(self, entry):
        for op in entry.ops:
            self.set(op.key, None if op.delete else op.value)
        self._apply_dedupe(entry)
        self.mark, self.schema = entry.mark, entry.schema

    def _apply_dedupe(self, entry):
        for key in entry.forget_keys:
            self._drop_reply(key)
            self.seen[False].pop(key, None)
        for caller in entry.forget_callers:
            for n in self.numbers.pop(caller, []):
                self._drop_reply(caller + b"/%d" % n)
            if self.lows.pop(caller, None) is not None:
                self.dedupe_bytes -= len(caller) + OVERHEAD
            self.seen[True].pop(caller, None)
        if entry.HasField("low"):
            self._set_low(entry.low.caller, entry.low.n)
        if entry.HasField("reply"):
            reply = wire.Reply()
            reply.CopyFrom(entry.reply)
            reply.mark = entry.mark
            self._put_reply(reply)
        if entry.next_call:
            self.next_call = entry.next_call

    def _put_reply(self, reply):
        self._drop_reply(reply.key)
        self.replies[reply.key] = reply
        self.dedupe_bytes += len(reply.key) + len(reply.body) + OVERHEAD
        caller, n = parse_key(reply.key)
        if n is not None:
            bisect.insort(self.numbers.setdefault(caller, []), n)
        self._touch(reply.key)

    def _drop_reply(self, key):
        reply = self.replies.pop(key, None)
        if reply is None:
            return
        self.dedupe_bytes -= len(reply.key) + len(reply.body) + OVERHEAD
        caller, n = parse_key(key)
        numbers = self.numbers.get(caller, [])
        if n is not None and n in numbers:
            numbers.remove(n)

    def _set_low(self, caller, n):
        if caller not in self.lows:
            self.dedupe_bytes += len(caller) + OVERHEAD
        elif self.lows[caller] >= n:
            return
        self.lows[caller] = n
        numbers = self.numbers.get(caller, [])
        for below in numbers[:bisect.bisect_left(numbers, n)]:
            self._drop_reply(caller + b"/%d" % below)
        self._touch(caller + b"/0")

    def _touch(self, key):
        caller, n = parse_key(key)
        seen = self.seen[n is not None]
        seen[caller] = time.monotonic()
        seen.move_to_end(caller)

    def _aged(self, callers, limit):
        out, now = [], time.monotonic()
        for name, when in self.seen[callers].items():
            if len(out) == limit or now - when < (CALLER_AGE if callers else KEY_AGE):
                break
            out.append(name)
        return out

    # The journal.

    def _reset_journal(self):
        self.journal = collections.deque()  # (mark, schema, encoded entry), marks without a gap
        self.journal_bytes = 0
        self.followers = {}  # id -> the next mark that it reads
        self.life = object()
        self._waiting = []

    def _wake(self):
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    def _trim(self):
        needed = min(self.followers.values(), default=self.mark + 1)
        while self.journal_bytes > JOURNAL_BYTES and len(self.journal) > 1 and self.journal[0][0] < needed:
            self.journal_bytes -= len(self.journal.popleft()[2])

    def backlog(self):
        """The bytes that the slowest follower has not read."""
        needed = min(self.followers.values(), default=self.mark + 1)
        if not self.journal or needed > self.mark:
            return 0
        if needed <= self.journal[0][0]:
            return self.journal_bytes
        return sum(len(e[2]) for e in list(self.journal)[needed - self.journal[0][0]:])

    def since(self, mark):
        """The entries after mark; None: the journal does not reach back that far."""
        if mark > self.mark:
            raise Refused(Code.OUT_OF_RANGE, f"mark {mark} is newer than this state, which is at {self.mark}: it belongs to another history")
        if mark == self.mark:
            return []
        if not self.journal or mark + 1 < self.journal[0][0]:
            return None
        return list(self.journal)[mark + 1 - self.journal[0][0]:]

    async def follow(self, mark, chunk):
        """Yields the frames of the entries after mark, as they are written, for ever."""
        if self.since(mark) is None:
            raise Refused(Code.OUT_OF_RANGE, "the journal no longer holds the entries after that mark: take a full checkpoint first")
        me, life = object(), self.life
        self.followers[me] = mark + 1
        try:
            while True:
                if self.life is not life:
                    raise Refused(Code.OUT_OF_RANGE, "the state was replaced by a restore: follow again from a new checkpoint")
                for entry in self.since(mark):
                    for frame in entry_frames(entry, chunk):
                        yield frame
                    mark = entry[0]
                    self.followers[me] = mark + 1
                if mark == self.mark and self.life is life:
                    future = asyncio.get_running_loop().create_future()
                    self._waiting.append(future)
                    await future
        finally:
            self.followers.pop(me, None)

    # Checkpoints.

    def checkpoint(self, since, chunk):
        """The frames of the state of this moment; of what changed after the mark since, where the journal still says it and it is shorter."""
        entries = self.since(since) if since else None
        pairs = [(k, self.values[k]) for k in self.keys]  # values are immutable: later calls do not change these
        dedupe = [wire.Dedupe(next_call=self.next_call)]
        dedupe += [wire.Dedupe(low=wire.Low(caller=c, n=n)) for c, n in self.lows.items()]
        dedupe += [wire.Dedupe(reply=r) for r in self.replies.values()]
        mark, schema = self.mark, self.schema
        size = sum(len(record(wire.Pair(key=k, value=v))) for k, v in pairs) + sum(len(record(d)) for d in dedupe)
        delta = entries is not None and sum(len(e[2]) for e in entries) <= size

        def frames():
            if delta:
                yield sealed(mark=mark, schema=schema, since_mark=since, total_bytes=sum(len(e[2]) for e in entries))
                for entry in entries:
                    yield from entry_frames(entry, chunk)
            else:
                yield sealed(mark=mark, schema=schema, total_bytes=size)
                yield from section_frames("map", (record(wire.Pair(key=k, value=v)) for k, v in pairs), chunk)
                yield from section_frames("dedupe", map(record, dedupe), chunk)
            yield sealed(section="end", mark=mark, last=True)

        return frames()

    async def restore(self, frames, schemas):
        """Replaces the state by what the frames hold, or changes nothing and raises Refused. Returns their bytes."""
        r = Restorer(self, schemas)
        async for frame in frames:
            r.frame(frame)
        r.complete()
        self._wake()  # who follows begins again
        self.__dict__.update(r.store.__dict__)
        self._reset_journal()
        return r.bytes

    def copy(self):
        other = Store(self.schema)
        other.mark, other.next_call, other.dedupe_bytes = self.mark, self.next_call, self.dedupe_bytes
        other.values, other.keys = dict(self.values), list(self.keys)
        other.replies, other.lows = dict(self.replies), dict(self.lows)
        other.numbers = {c: list(ns) for c, ns in self.numbers.items()}
        other.seen = {c: collections.OrderedDict(names) for c, names in self.seen.items()}
        return other


def record(message):
    encoded = message.SerializeToString(deterministic=True)
    return varint(len(encoded)) + encoded


def clamp(chunk):
    return min(max(chunk or CHUNK, 1 << 10), 2 << 20)


def section_frames(section, records, chunk):
    """Cuts the stream of a section's records into frames."""
    chunk, offset, buffer = clamp(chunk), 0, bytearray()
    for r in records:
        buffer += r
        while len(buffer) >= chunk:
            yield sealed(section=section, offset=offset, data=bytes(buffer[:chunk]))
            offset += chunk
            del buffer[:chunk]
    if buffer:
        yield sealed(section=section, offset=offset, data=bytes(buffer))


def entry_frames(entry, chunk):
    mark, schema, encoded = entry
    chunk = clamp(chunk)
    for offset in range(0, len(encoded), chunk):
        yield sealed(section="journal", mark=mark, schema=schema, offset=offset, data=encoded[offset:offset + chunk],
                     last=offset + chunk >= len(encoded))


class Restorer:
    """Takes frames one by one, on a copy that becomes the state only when all of them have come."""

    def __init__(self, store, schemas):
        self.store, self.schemas = store.copy(), schemas
        self.bytes = 0
        self.open = self.delta = False  # between a header and its end; of what changed
        self.header = self.total = self.got = 0
        self.section, self.offset, self.entry = "", 0, 0
        self.buffer = bytearray()

    def fail(self, why):
        raise Refused(Code.DATA_LOSS, f"state stream refused: section {self.section!r} at byte {self.offset}: {why}")

    def readable(self, schema):
        if schema not in self.schemas:
            self.fail(f"schema {schema}: this version reads {self.schemas}; restore it with a version that reads it")

    def frame(self, f):
        if f.xxh64 != digest(f):
            self.fail("the digest does not match: the frame was damaged or cut off")
        if f.deleted:
            self.fail("a deleted section: this state has none")
        if f.section == "":
            self.begin(f)
        elif f.section in ("map", "dedupe"):
            self.records(f)
        elif f.section == "journal":
            self.journal(f)
        elif f.section == "end":
            self.end(f)
        else:
            self.fail(f"unknown section {f.section!r}")

    def begin(self, f):
        if self.open or self.buffer:
            self.fail("a header inside another checkpoint or entry")
        self.readable(f.schema)
        self.open, self.delta = True, f.since_mark != 0
        self.header, self.total, self.got = f.mark, f.total_bytes, 0
        self.section, self.offset = "", 0
        if self.delta:
            if f.since_mark > self.store.mark:
                self.fail(f"a delta on top of mark {f.since_mark}, but the state is at {self.store.mark}")
            return
        self.store = Store(f.schema)
        self.store.mark = f.mark

    def take(self, f):
        if f.offset != self.offset:
            self.fail(f"a frame at offset {f.offset}: one is missing or repeated")
        if not f.data:
            self.fail("an empty frame")
        self.offset += len(f.data)
        self.got += len(f.data)
        self.bytes += len(f.data)
        self.buffer += f.data

    def records(self, f):
        if not self.open or self.delta:
            self.fail(f"a frame of section {f.section!r} outside a full checkpoint")
        if f.section != self.section:
            if self.buffer:
                self.fail("the section ends inside a record")
            if self.section == "dedupe":
                self.fail(f"section {f.section!r} after section dedupe")
            self.section, self.offset = f.section, 0
        self.take(f)
        at = 0
        while True:
            size, n = read_varint(self.buffer, at)
            if n == 0:
                if len(self.buffer) - at >= 10:
                    self.fail("a record's length is not a number")
                break
            if len(self.buffer) - at - n < size:
                break
            self.record(bytes(self.buffer[at + n:at + n + size]))
            at += n + size
        del self.buffer[:at]

    def record(self, encoded):
        s = self.store
        if self.section == "map":
            pair = self.parse(wire.Pair, encoded)
            if s.keys and pair.key <= s.keys[-1]:
                self.fail("keys out of order")
            s.keys.append(pair.key)
            s.values[pair.key] = pair.value
            return
        d = self.parse(wire.Dedupe, encoded)
        kind = d.WhichOneof("record")
        if kind == "reply":
            if not d.reply.key or not 0 < d.reply.mark <= self.header:
                self.fail("a remembered reply without a key, or with a mark that the checkpoint does not hold")
            s._put_reply(d.reply)
        elif kind == "low":
            s._set_low(d.low.caller, d.low.n)
        elif kind == "next_call":
            s.next_call = max(1, d.next_call)
        else:
            self.fail("a dedupe record of an unknown kind")

    def parse(self, kind, encoded):
        try:
            return kind.FromString(encoded)
        except Exception as e:  # protobuf's DecodeError differs between its implementations
            self.fail(f"not a {kind.DESCRIPTOR.name}: {e}")

    def journal(self, f):
        if self.open and not self.delta:
            self.fail("a journal entry inside a full checkpoint")
        if f.offset == 0:
            if self.buffer:
                self.fail(f"entry {f.mark} starts inside entry {self.entry}")
            self.section, self.offset, self.entry = "journal", 0, f.mark
        if f.mark != self.entry:
            self.fail(f"a frame of entry {f.mark} inside entry {self.entry}")
        self.take(f)
        if not f.last:
            return
        entry = self.parse(wire.Entry, bytes(self.buffer))
        self.buffer.clear()
        if entry.mark != self.entry:
            self.fail(f"the frame says entry {self.entry}, the entry itself {entry.mark}")
        if entry.mark <= self.store.mark:
            return  # it is here already
        if entry.mark != self.store.mark + 1:
            self.fail(f"entry {entry.mark} after mark {self.store.mark}: entries between are missing")
        self.readable(entry.schema)
        self.store._apply(entry)

    def end(self, f):
        if not self.open:
            self.fail("an end without a header")
        if self.buffer:
            self.fail("the checkpoint ends inside a record")
        if f.mark != self.header or not f.last:
            self.fail(f"the end says mark {f.mark}, the header {self.header}")
        if self.got != self.total:
            self.fail(f"{self.got} bytes of payload, the header says {self.total}")
        if self.delta and self.store.mark < self.header:
            self.fail(f"the delta leads to mark {self.store.mark}, the header says {self.header}")
        self.open, self.section = False, ""

    def complete(self):
        if self.open or self.buffer:
            self.fail("the stream ends before the checkpoint does")


def read_varint(b, at):
    """(value, bytes read); 0 bytes: it is not whole."""
    value = shift = 0
    for n in range(10):
        if at + n >= len(b):
            return 0, 0
        value |= (b[at + n] & 0x7F) << shift
        shift += 7
        if b[at + n] < 0x80:
            return value, n + 1
    return 0, 0
