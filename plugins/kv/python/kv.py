"""kv.v1.KV in Python: the same service, attribute and state as the Go component beside it (plugins/kv), so each may be swapped for the other."""

import asyncio
import json

from google.protobuf import wrappers_pb2

import component_pb2 as contract
import kv_pb2
import kv_pb2_grpc
from component import Attribute, Component, describe, serve
from state import Code, Refused
from version import VERSION

SCHEMA = 1
DEFAULT_PAGE, MAX_PAGE, PAGE_BYTES = 100, 1000, 2 << 20
MAX_OPS, MAX_KEY, MAX_VALUE = 128, 4 << 10, 1 << 20


def parse_capacity(raw):
    try:
        n = int(json.loads(raw))  # 64-bit numbers may come quoted
    except (TypeError, ValueError) as e:
        raise Refused(Code.INVALID_ARGUMENT, f'attribute "capacity": {raw[:100]!r} is not a google.protobuf.Int64Value: {e}') from None
    if n < 1:
        raise Refused(Code.INVALID_ARGUMENT, f'attribute "capacity": {n}: a store holds at least 1 key')
    return n


capacity = Attribute(1_000_000, parse_capacity, lambda n: str(n).encode())


def load(txn, key):
    """The stored value; version 0 is an absent key."""
    raw = txn.get(key.encode())
    return kv_pb2.Stored() if raw is None else kv_pb2.Stored.FromString(raw)


def pair(key, v):
    return kv_pb2.Pair(key=key, value=v.value, version=v.version)


def check_version(request, v):
    if request.HasField("if_version") and request.if_version != v.version:
        raise Refused(Code.ABORTED, f'key "{request.key[:60]}" is at version {v.version}, not {request.if_version}')


def put(txn, request):
    size = len(request.key.encode())
    if not 1 <= size <= MAX_KEY:
        raise Refused(Code.INVALID_ARGUMENT, f"a key of {size} bytes: 1 to {MAX_KEY}")
    if len(request.value.encode()) > MAX_VALUE:
        raise Refused(Code.INVALID_ARGUMENT, f'key "{request.key[:60]}": a value of {len(request.value.encode())} bytes, at most {MAX_VALUE}')
    old = load(txn, request.key)
    check_version(request, old)
    if old.version == 0 and len(txn) >= capacity.value:
        raise Refused(Code.RESOURCE_EXHAUSTED, f"the store is full: {len(txn)} keys of at most {capacity.value} (attribute capacity)")
    stored = kv_pb2.Stored(value=request.value, version=old.version + 1)
    txn.put(request.key.encode(), stored.SerializeToString(deterministic=True))
    return kv_pb2.PutReply(version=stored.version)


def get(txn, request):
    v = load(txn, request.key)
    if v.version == 0:
        raise Refused(Code.NOT_FOUND, f'no key "{request.key[:60]}"')
    return pair(request.key, v)


def delete(txn, request):
    check_version(request, load(txn, request.key))
    return kv_pb2.DeleteReply(deleted=txn.delete(request.key.encode()))


def scan(txn, request):
    limit = min(request.limit or DEFAULT_PAGE, MAX_PAGE)
    reply, size = kv_pb2.ScanReply(), 0
    for key, raw in txn.scan(request.prefix.encode(), request.after.encode()):
        if len(reply.pairs) == limit or size > PAGE_BYTES:
            reply.more = True
            break
        reply.pairs.append(pair(key.decode(), kv_pb2.Stored.FromString(raw)))
        size += len(key) + len(raw)
    return reply


def txn_of(txn, request):
    n = max(len(request.compares), len(request.then), len(request.otherwise))
    if n > MAX_OPS:
        raise Refused(Code.INVALID_ARGUMENT, f"{n} compares or operations, at most {MAX_OPS} of each")
    reply = kv_pb2.TxnReply(succeeded=all(load(txn, c.key).version == c.version for c in request.compares))
    for i, op in enumerate(request.then if reply.succeeded else request.otherwise):
        kind = op.WhichOneof("op")
        try:
            if kind == "put":
                reply.results.add(put=put(txn, op.put))
            elif kind == "get":
                reply.results.add(get=pair(op.get.key, load(txn, op.get.key)))
            elif kind == "delete":
                reply.results.add(delete=delete(txn, op.delete))
            else:
                raise Refused(Code.INVALID_ARGUMENT, "put, get or delete is missing")
        except Refused as e:
            raise Refused(e.code, f"operation {i}: {e.text}") from None
    return reply


class KV(kv_pb2_grpc.KVServicer):
    def __init__(self, component):
        self.component = component

    async def Put(self, request, context):
        return await self.component.write(context, "/kv.v1.KV/Put", request, kv_pb2.PutReply, put)

    async def Delete(self, request, context):
        return await self.component.write(context, "/kv.v1.KV/Delete", request, kv_pb2.DeleteReply, delete)

    async def Txn(self, request, context):
        return await self.component.write(context, "/kv.v1.KV/Txn", request, kv_pb2.TxnReply, txn_of)

    async def Get(self, request, context):
        return await self.component.read(context, request, get)

    async def Scan(self, request, context):
        return await self.component.read(context, request, scan)


async def run():
    spec = contract.AttributeSpec(name="capacity", message_type="google.protobuf.Int64Value", default_json=capacity.encode())
    files = [wrappers_pb2.DESCRIPTOR, kv_pb2.DESCRIPTOR]
    component = Component(describe("kv", VERSION, {"kv": "kv.v1.KV"}, files, [spec], SCHEMA), SCHEMA, attributes={"capacity": capacity})
    await serve(component, lambda server: kv_pb2_grpc.add_KVServicer_to_server(KV(component), server))


def main():
    asyncio.run(run())
