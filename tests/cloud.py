"""A cloud store in memory that behaves as gs:// does: no folders, no appending, no locks, objects appear whole.

`fsspec` (so etils.epath) reads and writes it directly, in place of the package gcsfs. Tensorstore, with which Orbax
writes arrays, and array_record have clients of their own, and get it over HTTP on the loopback interface.
"""

import functools
import io
import json
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec

from combiner import paths

BUCKET = 'bucket'
OBJECTS: dict[str, tuple[int, bytes]] = {}  # generation and content, by 'bucket/name'
WRITES: list[str] = []  # names, in the order of writing
STATES: list[dict] = []  # the objects after each write: what a kill at that moment leaves
_LOCK = threading.Lock()


def put(name: str, content: bytes, generation: str | None = None) -> int | None:
    """Writes an object if its present generation, 0 for none, is as asked; returns the new one."""
    with _LOCK:
        if generation is not None and int(generation) != OBJECTS.get(name, (0, b''))[0]:
            return None
        WRITES.append(name)
        OBJECTS[name] = (len(WRITES), content)
        STATES.append(dict(OBJECTS))
        return len(WRITES)


class Store(fsspec.AbstractFileSystem):
    protocol = ('gcs', 'gs')
    cachable = False

    @classmethod
    def _strip_protocol(cls, path):
        return path.removeprefix('gs://').removeprefix('gcs://').strip('/')

    def ls(self, path, detail=True, **kwargs):
        path = self._strip_protocol(path)
        if path in OBJECTS:
            found = {path: {'name': path, 'size': len(OBJECTS[path][1]), 'type': 'file'}}
        else:
            below = f'{path}/' if path else ''
            names = [name[len(below) :] for name in list(OBJECTS) if name.startswith(below)]
            found = {}
            for name in sorted(names):
                first, slash, _ = name.partition('/')
                full = below + first
                size = 0 if slash else len(OBJECTS[full][1])
                found[full] = {'name': full, 'size': size, 'type': 'directory' if slash else 'file'}
            if not found and path != BUCKET:
                raise FileNotFoundError(path)
        return list(found.values()) if detail else list(found)

    def info(self, path, **kwargs):
        path = self._strip_protocol(path)
        listed = self.ls(path)
        return listed[0] if path in OBJECTS else {'name': path, 'size': 0, 'type': 'directory'}

    def _open(self, path, mode='rb', **kwargs):
        path = self._strip_protocol(path)
        if mode == 'rb':
            if path not in OBJECTS:
                raise FileNotFoundError(path)
            return io.BytesIO(OBJECTS[path][1])
        if mode != 'wb':
            raise NotImplementedError(f'a store has no mode {mode}')
        return _Upload(path)

    def mkdir(self, path, **kwargs): ...

    def makedirs(self, path, exist_ok=False): ...

    def rmdir(self, path): ...

    def cp_file(self, path1, path2, **kwargs):
        if self._strip_protocol(path1) in OBJECTS:
            put(self._strip_protocol(path2), OBJECTS[self._strip_protocol(path1)][1])

    def _rm(self, path):
        OBJECTS.pop(self._strip_protocol(path), None)  # of a folder there is nothing


class _Upload(io.BytesIO):
    def __init__(self, path):
        super().__init__()
        self._path = path

    def close(self):
        if not self.closed:
            put(self._path, self.getvalue())
        super().close()


class _Handler(BaseHTTPRequestHandler):
    """What tensorstore asks of Google's JSON API: objects by name, and lists of them."""

    protocol_version = 'HTTP/1.1'

    def log_message(self, *_): ...

    def _answer(self, status, content=b'', **headers):
        self.send_response(status)
        for name, value in {'Content-Length': str(len(content)), **headers}.items():
            self.send_header(name.replace('_', '-'), value)
        self.end_headers()
        self.wfile.write(content)

    def _asked(self):
        address = urlsplit(self.path)
        parts = address.path.removeprefix('/upload').removeprefix('/storage/v1/b/').split('/', 2)
        query = {name: values[0] for name, values in parse_qs(address.query).items()}
        return parts[0], unquote(parts[2]) if len(parts) > 2 else query.get('name', ''), query

    def do_GET(self):
        bucket, name, query = self._asked()
        if not name:
            first, last = query.get('startOffset', ''), query.get('endOffset', '\uffff')
            prefix = query.get('prefix', '')
            names = [key.removeprefix(f'{bucket}/') for key in sorted(OBJECTS) if key.startswith(f'{bucket}/{prefix}')]
            items = [
                {'name': key, 'size': str(len(OBJECTS[f'{bucket}/{key}'][1]))} for key in names if first <= key < last
            ]
            return self._answer(200, json.dumps({'items': items}).encode(), Content_Type='application/json')
        if f'{bucket}/{name}' not in OBJECTS:
            return self._answer(404)
        generation, content = OBJECTS[f'{bucket}/{name}']
        headers = {'x_goog_generation': str(generation)}
        size = len(content)
        if asked := self.headers.get('Range'):
            start, _, stop = asked.removeprefix('bytes=').partition('-')
            begin = int(start) if start else max(0, size - int(stop))
            end = min(size, int(stop) + 1) if start and stop else size
            headers['Content_Range'] = f'bytes {begin}-{end - 1}/{size}'
            return self._answer(206, content[begin:end], **headers)
        return self._answer(200, content, **headers)

    def do_POST(self):
        bucket, _, query = self._asked()
        content = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        generation = put(f'{bucket}/{query["name"]}', content, query.get('ifGenerationMatch'))
        if generation is None:
            return self._answer(412)
        answer = {'name': query['name'], 'generation': str(generation), 'size': str(len(content))}
        return self._answer(200, json.dumps(answer).encode(), Content_Type='application/json')

    def do_DELETE(self):
        bucket, name, _ = self._asked()
        found = OBJECTS.pop(f'{bucket}/{name}', None)
        return self._answer(204 if found else 404)


@functools.cache
def _address() -> str:
    """Starts the server; one for all tests of a process, as the clients keep its address."""
    server = ThreadingHTTPServer(('127.0.0.1', 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f'http://127.0.0.1:{server.server_address[1]}'


def serve(monkeypatch) -> None:
    """Makes gs://bucket this store, empty, for fsspec, tensorstore, array_record and Orbax."""
    for record in (OBJECTS, WRITES, STATES):
        record.clear()
    paths._check_bucket.cache_clear()
    for name in Store.protocol:
        fsspec.register_implementation(name, Store, clobber=True)
    monkeypatch.setenv('TENSORSTORE_GCS_HTTP_URL', _address())
    monkeypatch.setenv('CLOUD_STORAGE_EMULATOR_ENDPOINT', _address())  # of array_record
    monkeypatch.setenv('GOOGLE_AUTH_TOKEN_FOR_TESTING', 'none')
    client = types.SimpleNamespace(get_bucket=lambda name: name)
    storage = types.ModuleType('google.cloud.storage')
    storage.Client = lambda: client
    cloud = types.ModuleType('google.cloud')
    cloud.storage = storage
    monkeypatch.setitem(sys.modules, 'google.cloud', cloud)
    monkeypatch.setitem(sys.modules, 'google.cloud.storage', storage)
