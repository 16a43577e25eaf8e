"""What a component process owes its node (component.proto), in Python: the handshake, the lifecycle, the lease, and calls that are transactions.

There is no library of ours in here but the stubs that protoc generates; copy what you need. docs/writing-a-component.md says the same in words.
"""

import asyncio
import grp
import hmac
import os
import signal
import sys
import threading
import time

import grpc
import xxhash
from google.protobuf import descriptor_pb2

import component_pb2 as contract
import component_pb2_grpc as contract_grpc
from state import Code, Refused, Store, Txn

COOKIE, COOKIE_VALUE, PROTOCOL = "COPPICE_COMPONENT", "component.v1", 1
META_CREDENTIAL, META_KEY, META_LOW, META_MARK = "x-coppice-credential", "x-coppice-key", "x-coppice-low", "x-coppice-mark"
LEASE_LAPSED = 75  # exit status
MAX_MESSAGE = 16 << 20
LEASE_TTL, FIRST_LEASE, LEASE_LOOK = 2.0, 10.0, 0.1  # seconds


def boot_time():
    """Leases are counted on a clock that goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def say(text):
    print(text, file=sys.stderr, flush=True)


class Component(contract_grpc.ComponentServicer):
    """Serves the contract for one instance: a store, attributes, and handlers that are run as transactions."""

    def __init__(self, description, schema, reads=(), attributes=None):
        self.description = description
        self.store, self.reads = Store(schema), sorted({schema, *reads})
        self.schema = schema
        self.attributes = attributes or {}  # name -> Attribute
        self.revision = 0
        self.state, self.instance = contract.CREATED, ""
        self.token = contract.Token()
        self.leased = False
        self.lease = None
        self.stopped = asyncio.Event()

    # Calls. A handler takes (txn, request), does not wait, and returns the reply or raises Refused: so it is one transaction.

    async def write(self, context, method, request, reply_type, handler):
        try:
            self._serving()
            meta = dict(context.invocation_metadata())
            key = meta.get(META_KEY, "").encode()
            low = int(meta.get(META_LOW) or 0)
            print_ = xxhash.xxh64_intdigest(method.encode() + b"\0" + request.SerializeToString(deterministic=True)) if key else 0
            known = self.store.remembered(key, print_)
            if known is not None:
                self._mark(context, known.mark)
                return reply_type.FromString(known.body)
            txn = Txn(self.store, read_only=False)
            try:
                reply = handler(txn, request)
                mark = self.store.commit(txn, key, low, print_, reply.SerializeToString())
            except BaseException:
                txn.roll_back()
                raise
            self._mark(context, mark)
            return reply
        except Refused as e:
            await self._abort(context, e)

    async def read(self, context, request, handler):
        try:
            self._serving()
            reply = handler(Txn(self.store, read_only=True), request)
            self._mark(context, self.store.mark)
            return reply
        except Refused as e:
            await self._abort(context, e)

    def _mark(self, context, mark):
        """The gate gives an answer that depends on this mark only when the mark is committed. 0 is nothing to wait for."""
        if mark:
            context.set_trailing_metadata(((META_MARK, str(mark)),))

    async def _abort(self, context, e):
        trailers = list(e.trailers)
        if self.store.mark:
            trailers.append((META_MARK, str(self.store.mark)))
        await context.abort(e.code, e.text, tuple(trailers))

    def _serving(self):
        if self.state == contract.STARTED:
            return
        if self.state == contract.CREATED:
            raise Refused(Code.FAILED_PRECONDITION, "the component is not started: call Start first")
        raise Refused(Code.UNAVAILABLE, f"the component is {contract.State.Name(self.state).lower()}")

    # The contract.

    async def Describe(self, request, context):
        return self.description

    async def Start(self, request, context):
        if self.state in (contract.STARTED, contract.FROZEN):
            if request.instance and request.instance != self.instance:
                await context.abort(Code.FAILED_PRECONDITION, f"already started as {self.instance}, not {request.instance}")
            self.adopt(request.token)
            return self.status()
        if self.state != contract.CREATED:
            await context.abort(Code.FAILED_PRECONDITION, "cannot start: it has ended; start a new process")
        if request.leased and self.lease:
            self.leased = True
            await self.lease.granted.wait()  # exactly-one: before the first grant nothing may begin
        self.adopt(request.token)
        self.instance = request.instance
        try:
            self._set_attributes(request.attributes.json)
        except Refused as e:
            self.state = contract.FAILED
            await context.abort(e.code, e.text)
        self.revision = max(self.revision, request.attributes.revision)
        self.state = contract.STARTED
        return self.status()

    async def Quiesce(self, request, context):
        # No handler waits in the middle, so none runs now: it is quiet as soon as nothing new is let in.
        if self.state not in (contract.STARTED, contract.FROZEN):
            await context.abort(Code.FAILED_PRECONDITION, f"cannot freeze: the component is {contract.State.Name(self.state)}")
        self.state = contract.FROZEN
        return self.status()

    async def Resume(self, request, context):
        if self.state not in (contract.STARTED, contract.FROZEN):
            await context.abort(Code.FAILED_PRECONDITION, f"cannot resume: the component is {contract.State.Name(self.state)}")
        self.state = contract.STARTED
        return self.status()

    async def Stop(self, request, context):
        self.state = contract.STOPPED
        self.stopped.set()
        return self.status()

    async def Heartbeat(self, beat, context):
        self.adopt(beat.token)
        return contract.Beat(seq=beat.seq, token=self.token, status=self.status())

    def adopt(self, token):
        if (token.incarnation, token.epoch) > (self.token.incarnation, self.token.epoch):
            self.token.CopyFrom(token)

    def status(self):
        return contract.Status(state=self.state, info={"mark": str(self.store.mark), "dedupe_bytes": str(self.store.dedupe_bytes)})

    async def GetAttributes(self, request, context):
        for name in request.names:
            if name not in self.attributes:
                await context.abort(Code.INVALID_ARGUMENT, f"no attribute {name!r}; there are: {', '.join(self.attributes)}")
        return self._attributes(request.names or self.attributes)

    async def SetAttributes(self, request, context):
        try:
            if request.if_revision and request.if_revision != self.revision:
                raise Refused(Code.ABORTED, f"attributes are at revision {self.revision}, not {request.if_revision}: read them again")
            self._set_attributes(request.json, request.dry_run)
        except Refused as e:
            await context.abort(e.code, e.text)
        if request.dry_run:
            return contract.Attributes(json=request.json, revision=self.revision)
        if request.json:
            self.revision += 1
        return self._attributes(self.attributes)

    def _attributes(self, names):
        return contract.Attributes(json={n: self.attributes[n].encode() for n in names}, revision=self.revision)

    def _set_attributes(self, values, dry_run=False):
        """All or none."""
        checked = []
        for name, raw in values.items():
            if name not in self.attributes:
                raise Refused(Code.INVALID_ARGUMENT, f"no attribute {name!r}; there are: {', '.join(self.attributes)}")
            checked.append((self.attributes[name], self.attributes[name].parse(raw)))
        if not dry_run:
            for attribute, value in checked:
                attribute.value = value

    async def Checkpoint(self, request, context):
        try:
            for frame in self.store.checkpoint(request.since_mark, request.chunk_bytes):
                yield frame
                await asyncio.sleep(0)  # calls go on in between: the frames are those of the moment it began
        except Refused as e:
            await context.abort(e.code, e.text)

    async def Deltas(self, request, context):
        try:
            async for frame in self.store.follow(request.since_mark, request.chunk_bytes):
                yield frame
        except Refused as e:
            await context.abort(e.code, e.text)

    async def Restore(self, frames, context):
        if self.state not in (contract.CREATED, contract.FROZEN):
            await context.abort(Code.FAILED_PRECONDITION, "cannot restore: restore before Start, or freeze it first")
        try:
            got = await self.store.restore(frames, self.reads)
        except Refused as e:
            await context.abort(e.code, e.text)
        return contract.RestoreReply(bytes=got, mark=self.store.mark)


class Attribute:
    """A value that operators see and set. parse turns its JSON into the value, or raises Refused; encode does the reverse."""

    def __init__(self, value, parse, encode):
        self.value, self.parse = value, parse
        self._encode = encode

    def encode(self):
        return self._encode(self.value)


def describe(type_, version, provides, files, attributes, schema, reads=()):
    """provides: interface -> service. files: the descriptors of all .proto files, each after what it imports."""
    d = contract.Description(type=type_, version=version, contract=PROTOCOL, features=["txn-calls", "deltas", "incremental"])
    for name, service in provides.items():
        d.provides.add(name=name, service=service)
    d.attributes.extend(attributes)
    d.state.CopyFrom(contract.StateSpec(stateful=True, writes_schema=schema, reads_schemas=sorted({schema, *reads}), incremental=True, live_snapshot=True))
    for f in files:
        d.services.file.append(descriptor_pb2.FileDescriptorProto.FromString(f.serialized_pb))
    return d


class Lease:
    """Keeps the process's lease. A component that no node vouches for ends itself: nothing may run that nobody can stop."""

    def __init__(self, component, socket, credential):
        self.component, self.socket, self.credential = component, socket, credential
        self.until = boot_time() + FIRST_LEASE
        self.granted = asyncio.Event()
        # On a thread of its own: it has to end the process also when the event loop hangs.
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self):
        while True:
            left = self.until - boot_time()
            if left <= 0:
                say(f"lease lapsed {-left:.3f} s ago: no node vouches for this process any more; it ends")
                os._exit(LEASE_LAPSED)
            time.sleep(max(min(left, LEASE_LOOK), LEASE_LOOK / 10))

    async def keep(self):
        # The path of a unix socket is no name that a server would accept as :authority.
        options = [("grpc.default_authority", "localhost")]
        async with grpc.aio.insecure_channel("unix:" + self.socket, options=options) as channel:
            node = contract_grpc.NodeStub(channel)
            while True:
                try:
                    await self._stream(node)
                except (grpc.aio.AioRpcError, asyncio.TimeoutError, ConnectionError) as e:
                    say(f"lease stream ended, asking again: {e!r}")
                await asyncio.sleep(0.05)

    async def _stream(self, node):
        """A beat, its grant, and again after a third of the time granted. A beat that is not answered ends the stream: on a new one the next grant
        cannot be taken for the answer to an older beat."""
        call = node.Lease(metadata=((META_CREDENTIAL, self.credential),), wait_for_ready=True)
        ttl = LEASE_TTL
        try:
            while True:
                asked = boot_time()
                await call.write(contract.LeaseBeat(token=self.component.token))
                grant = await asyncio.wait_for(call.read(), ttl / 3)
                if grant is grpc.aio.EOF:
                    raise ConnectionError("the node ended the stream")
                ttl = grant.ttl_ms / 1000 or LEASE_TTL
                self.until = asked + ttl  # from when it was asked for
                self.component.adopt(grant.token)
                self.component.leased = grant.leased
                if boot_time() < self.until:
                    self.granted.set()
                await asyncio.sleep(ttl / 3)
        finally:
            call.cancel()


class Gatekeeper(grpc.aio.ServerInterceptor):
    """Answers the node only."""

    def __init__(self, credential):
        self.credential = credential

    async def intercept_service(self, continuation, details):
        handler = await continuation(details)
        given = [v for k, v in details.invocation_metadata if k == META_CREDENTIAL]
        if not self.credential or len(given) == 1 and hmac.compare_digest(given[0], self.credential) or handler is None:
            return handler

        async def refuse(request, context):
            await context.abort(Code.UNAUTHENTICATED, f"this component answers its node only: metadata {META_CREDENTIAL} is missing or wrong")

        async def refuse_stream(request, context):
            await refuse(request, context)
            yield  # never reached; it makes this a stream

        make = {
            (False, False): grpc.unary_unary_rpc_method_handler, (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler, (True, True): grpc.stream_stream_rpc_method_handler,
        }[handler.request_streaming, handler.response_streaming]
        return make(refuse_stream if handler.response_streaming else refuse)


def raw(handler):
    """A method whose messages are bytes: go-plugin's own two need no more."""
    return grpc.unary_unary_rpc_method_handler(handler)


async def serve(component, register):
    """Runs the component as the process that it is. register adds its services to the server."""
    if os.environ.get(COOKIE) != COOKIE_VALUE:
        sys.exit(f"this is a component: a node starts it. Try: coppice registry push {sys.argv[0]}")
    if os.environ.get("PLUGIN_CLIENT_CERT"):
        sys.exit("the client asks for AutoMTLS, which a component that outlives its client cannot offer: start it without")
    loop = asyncio.get_running_loop()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a node's terminal is the node's
    loop.add_signal_handler(signal.SIGTERM, component.stopped.set)

    credential = os.environ.get("COPPICE_CREDENTIAL", "")
    server = grpc.aio.server(interceptors=[Gatekeeper(credential)], options=[
        ("grpc.max_receive_message_length", MAX_MESSAGE), ("grpc.max_send_message_length", MAX_MESSAGE),
    ])
    contract_grpc.add_ComponentServicer_to_server(component, server)
    register(server)

    async def healthy(request, context):
        return b"\x08\x01"  # HealthCheckResponse{status: SERVING}

    async def shutdown(request, context):
        component.stopped.set()
        return b""

    server.add_generic_rpc_handlers((
        grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": raw(healthy)}),
        grpc.method_handlers_generic_handler("plugin.GRPCController", {"Shutdown": raw(shutdown)}),
    ))

    path = os.path.join(os.environ.get("PLUGIN_UNIX_SOCKET_DIR", "/tmp"), f"plugin{os.getpid()}")
    if os.path.exists(path):
        os.remove(path)  # a leftover of a process that had our pid
    server.add_insecure_port("unix:" + path)
    await server.start()
    group = os.environ.get("PLUGIN_UNIX_SOCKET_GROUP", "")
    if group:
        os.chown(path, -1, int(group) if group.isdigit() else grp.getgrnam(group).gr_gid)
        os.chmod(path, 0o660)

    tasks = []
    node = os.environ.get("COPPICE_NODE_SOCKET", "")
    if node:
        component.lease = Lease(component, node, credential)
        tasks.append(asyncio.create_task(component.lease.keep()))
    print(f"1|{PROTOCOL}|unix|{path}|grpc|", flush=True)

    await component.stopped.wait()
    component.state = contract.STOPPED
    await server.stop(grace=3)
    for task in tasks:
        task.cancel()
    if os.path.exists(path):
        os.remove(path)
