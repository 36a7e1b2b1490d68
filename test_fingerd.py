"""Tests of fingerd.py: `make test` runs them all, `python3 -m unittest test_fingerd.WebTest` some.

They use real sockets and processes on loopback, and real clients and servers where those are
installed. Whoever waits here waits for an event, until a deadline; nobody sleeps to be in time.
FUZZ=100000, SOAK=100000 and KILLS=100 make some tests longer, FINGERD_REAL_CLIENTS=0 leaves out
those with real clients, `python3 test_fingerd.py bench` measures.

    part              tests                                       room of fingerd.py
    1. harness        (what the tests share: Service, Case)
    2. the house      LawsTest                                    all
    3. codecs         CodecsTest (and FuzzTest, below)            text, codecs
    4. store          StoreTest, StateFileTest                    store
    5. users file     UsersFileTest (and ReloaderTest, below)     services
    6. faces          FingerTest, SetterTest, WebTest,            answers, services
                      PrivateTest, XmlRpcTest, PlansTest
    7. command line   CommandLineTest                             command line
    8. real clients   RealClientsTest, BrowserTest                all
    9. IRC            IrcCodecTest, IrcSessionTest,               codecs, answers,
                      IrcOptionsTest, FakeServerTest, TlsTest,    command line, services
                      NgircdTest, InspircdTest,
                      HybridTest, ZncTest
    10. faults        DurabilityTest, PrivilegesTest,             store, services,
                      HostileTest, FuzzTest, ReloaderTest,        command line
                      StopTest
    11. around it     ReplicasTest, SurroundingsTest,             all
                      TopLevelTest, SystemdTest
    12. running       (the bench, and all tests side by side)
"""

from __future__ import annotations

import ast
import base64
import collections
import concurrent.futures
import contextlib
import datetime
import dis
import encodings
import faulthandler
import fcntl
import hashlib
import html.parser
import http
import http.client
import importlib.util
import io
import itertools
import json
import logging
import multiprocessing
import os
import pathlib
import pwd
import random
import re
import resource
import select
import shutil
import signal
import socket
import sqlite3
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.parse
import xml.etree.ElementTree
import xmlrpc.client
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, ClassVar, Iterator, NamedTuple
from unittest import mock

import fingerd

# ================================================================================================
# 1. harness: one way to run a fingerd, to talk to it, to wait, and to clean up
# ================================================================================================

DEADLINE = 20.0  # seconds after which a test gives up; none is meant to come near it
KILLS = int(os.environ.get("KILLS", "3"))  # rounds of kill -9
PEERS = int(os.environ.get("PEERS", "700"))  # hostile connections that are held to finger
SOAK = int(os.environ.get("SOAK", "1500"))  # connections after which nothing may have grown
FUZZ = int(os.environ.get("FUZZ", "300"))  # cases for the ports; six times as many for parsers
SEED = int(os.environ.get("SEED", "1"))
REAL_CLIENTS = os.environ.get("FINGERD_REAL_CLIENTS", "1") != "0"

FINGERD = pathlib.Path(fingerd.__file__).resolve()
HERE = FINGERD.parent
PROGRAM = (sys.executable, str(FINGERD))
FACES = ("finger", "setter", "web")
ROOT = os.geteuid() == 0
ACCOUNT = pwd.getpwuid(os.geteuid()).pw_name
if not hasattr(socket, "AF_NETLINK"):
    ACCOUNT = "127.0.0.1"
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"  # a user's own may lack the servers
USERS = "moshez: Happy and well\nshawn: alive\n"
HAPPY = b"Happy and well\r\n"
MOSHEZ = {"moshez": "Happy and well", "long": "é" * 400}
CALL = xmlrpc.client.dumps(("moshez",), "getUser").encode()


def setUpModule() -> None:
    """As many descriptors as the hostile peers need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 50_000 if hard == resource.RLIM_INFINITY else min(50_000, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    unittest.addModuleCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))


def needs(*programs: str) -> Any:
    """Skips a test where one is not installed, or was tried under another Python already."""
    there = REAL_CLIENTS and all(shutil.which(program, path=PATH) for program in programs)
    return unittest.skipUnless(there, f"without {' and '.join(programs)}")


# ---- waiting and working side by side ----------------------------------------------------------


def until(condition: Callable[[], Any], what: str = "") -> Any:
    """The first true value of `condition`, asked for until the deadline."""
    end = time.monotonic() + DEADLINE
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"not in time: {what or condition}")
        time.sleep(0.01)


def in_parallel(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What `work` returns for 0 to `count` - 1, each in a thread of its own."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


@contextlib.contextmanager
def meanwhile(count: int, work: Callable[[int], Any], pause: float = 0.0) -> Iterator[Any]:
    """While the block runs, `work` of 0 to `count` - 1 again and again, each in a thread.

    A failure in one of them ends all, sets the event that the block is given, and is raised.
    """
    over = threading.Event()

    def repeat(number: int) -> None:
        try:
            while not over.wait(pause):
                work(number)
        finally:
            over.set()

    with ThreadPoolExecutor(count) as pool:
        workers = [pool.submit(repeat, number) for number in range(count)]
        try:
            yield over
        finally:
            over.set()
        for worker in workers:
            worker.result()


# ---- files -------------------------------------------------------------------------------------

MOMENTS = itertools.count(1_000_000_000)


def new_folder() -> pathlib.Path:
    """A folder that everybody may look into."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="fingerd-test-"))
    folder.chmod(0o755)
    return folder


def put(path: pathlib.Path, text: str | bytes, age: float | None = None) -> None:
    """Replace a file by a rename, as careful editors do.

    It is so many seconds old; if not told, so old that nobody waits for it to settle.
    """
    new = path.with_name("new")
    new.write_bytes(text if isinstance(text, bytes) else text.encode())
    when = next(MOMENTS) if age is None else time.time() - age
    os.utime(new, (when, when))
    os.replace(new, path)


# ---- clients -----------------------------------------------------------------------------------


def free_port() -> int:
    """A free port for a server that is to come back on it: none that a client may be given."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def connect(
    port: int, data: bytes = b"", host: str = "127.0.0.1", source: str = ""
) -> socket.socket:
    """A connection on which `data` has been sent."""
    sock = socket.create_connection((host, port), DEADLINE, (source, 0) if source else None)
    sock.sendall(data)
    return sock


def slow_reader(port: int, data: bytes) -> socket.socket:
    """A connection whose answer has begun to come, and of which little fits into its buffer."""
    sock = socket.socket()
    sock.settimeout(DEADLINE)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8_192)
    sock.connect(("127.0.0.1", port))
    sock.sendall(data)
    sock.recv(1, socket.MSG_PEEK)
    return sock


def reset(sock: socket.socket) -> None:
    """Close the connection by a RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def refused(port: int, host: str = "127.0.0.1") -> bool:
    """Whether nobody listens on `port`."""
    try:
        connect(port, host=host).close()
    except OSError:
        return True
    return False


def read_all(sock: socket.socket) -> bytes:
    """Everything until the other side closes."""
    return b"".join(iter(lambda: sock.recv(65536), b""))


def ask(port: int, data: bytes, half_close: bool = True, host: str = "127.0.0.1") -> bytes:
    """What the server on `port` answers to `data` until it closes."""
    with connect(port, data, host) as sock:
        if half_close:
            sock.shutdown(socket.SHUT_WR)
        return read_all(sock)


def piecemeal(port: int, data: bytes) -> bytes:
    """What the server answers to `data` that comes byte by byte."""
    with connect(port) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in data:
            sock.sendall(bytes([byte]))
        sock.shutdown(socket.SHUT_WR)
        return read_all(sock)


class Response(NamedTuple):
    """What a web server answers to one request."""

    status: int
    headers: dict[str, str]
    body: bytes


def request(
    target: str = "/moshez",
    *headers: str,
    method: str = "GET",
    body: bytes = b"",
    version: str = "1.1",
) -> bytes:
    """A whole request."""
    lines = [f"{method} {target} HTTP/{version}", "Host: h", *headers]
    lines += [f"Content-Length: {len(body)}"] if body else []
    return "\r\n".join([*lines, "", ""]).encode() + body


def post(body: bytes, *headers: str, target: str = "/RPC2") -> bytes:
    """A whole POST request."""
    return request(target, *headers, method="POST", body=body)


def chunked(body: bytes, size: int) -> bytes:
    """The body in chunks of `size` bytes."""
    chunks = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"


def responses(data: bytes, *methods: str) -> list[Response]:
    """The responses to requests of these methods (GET where none is named)."""
    found = []
    for method in itertools.chain(methods, itertools.repeat("GET")):
        if not data:
            return found
        top, _, data = data.partition(b"\r\n\r\n")
        first, *lines = top.decode("latin-1").split("\r\n")
        headers = {line.partition(": ")[0].lower(): line.partition(": ")[2] for line in lines}
        status = int(first.split(" ")[1])
        size = (
            0 if method == "HEAD" or status in (100, 204, 304) else int(headers["content-length"])
        )
        assert len(headers) == len(lines) and len(data) >= size, data
        found.append(Response(status, headers, data[:size]))
        data = data[size:]
    return found


def fetch(
    port: int, *target: str, method: str = "GET", host: str = "127.0.0.1", **more: Any
) -> Response:
    """The one response to a request, whose parts are those of `request`."""
    answer = ask(port, request(*target, method=method, **more), host=host)
    (response,) = responses(answer, method)
    return response


def call(method: str, *params: Any) -> bytes:
    """The body of an XML-RPC request."""
    return xmlrpc.client.dumps(params, method).encode()


# ---- a fingerd ---------------------------------------------------------------------------------


def make_store(texts: Any = MOSHEZ, state: Any = None) -> Any:
    """A store that has read a users file with these texts."""
    store = fingerd.StatusStore()
    store.replace_file(fingerd.UsersFile(dict(texts), []), 1000.0)
    if state:
        store.restore(state)
    return store


def texts_of(store: Any) -> dict[str, str]:
    """All that the store shows."""
    return {user: status.text for user, status in store.now.users()}


def command(
    users: Any,
    *options: str,
    state: Any = "off",
    run_as: str = "0:0",
    program: tuple[str, ...] = PROGRAM,
) -> list[str]:
    """How to start a fingerd; where the options say nothing else, on free loopback ports.

    `run_as` "" leaves to the service what it does by itself when root starts it.
    """
    defaults = {"--state": str(state), **{f"--{face}": "127.0.0.1:0" for face in FACES}}
    if ROOT and run_as:
        defaults["--run-as"] = run_as
    for option, value in defaults.items():
        if option not in options:
            options += (option, value)
    return [*program, str(users), *options]


def run(words: list[str], **more: Any) -> tuple[int, list[str], list[str]]:
    """The exit status of a command that ends by itself, and the lines of its two outputs."""
    done = subprocess.run(words, capture_output=True, timeout=DEADLINE, **more)
    return done.returncode, done.stdout.decode().splitlines(), done.stderr.decode().splitlines()


class Service:
    """A fingerd process with a users file, a state file and free loopback ports of its own.

    Its users file may be another one, its `source`, and so may its `state`; `popen` is for
    subprocess.Popen, all else for `command`.
    """

    def __init__(
        self,
        text: str = USERS,
        *options: str,
        source: str = "",
        state: str | None = None,
        run_as: str = "0:0",
        program: tuple[str, ...] = PROGRAM,
        **popen: Any,
    ) -> None:
        self.folder = new_folder()
        self.users, self.state = self.folder / "users", self.folder / "state.db"
        put(self.users, text)
        if ROOT and not run_as:
            os.chown(self.folder, 1, 1)  # uid 1 is what it becomes
        how = {
            "state": self.state if state is None else state,
            "run_as": run_as,
            "program": program,
        }
        self.command = command(source or self.users, *options, **how)
        self.popen = popen
        self.start()

    def start(self) -> None:
        """Start the process, with the same options, and wait until it says that it is ready."""
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, **self.popen
        )
        self.pid, self.log = self.process.pid, []  # type: int, list[str]
        self.reader = threading.Thread(target=self._read_log, args=(self.process.stderr,))
        self.reader.start()
        self.wait_for("ready$")

    def _read_log(self, stream: Any) -> None:
        with stream:
            for line in stream:
                self.log.append(line.decode("utf-8", "replace").rstrip("\n"))

    def wait_for(self, pattern: str) -> str:
        """The first log line that holds `pattern`."""

        def found() -> str | None:
            lines = [line for line in list(self.log) if re.search(pattern, line)]
            if not lines and self.process.poll() is not None and not self.reader.is_alive():
                raise AssertionError(f"fingerd ended: {self.log}")
            return lines[0] if lines else None

        line: str = until(found, pattern)
        return line

    def complaints(self) -> list[str]:
        """The log lines that tell of more than the course of things."""
        return [line for line in self.log if " INFO " not in line]

    def port(self, face: str) -> int:
        """The port on which `face` listens."""
        return int(self.wait_for(f"{face} listening on").rpartition(":")[2])

    def finger(self, query: str) -> str:
        """The answer to a finger query."""
        return ask(self.port("finger"), query.encode() + b"\r\n").decode()

    def set(self, user: str, text: str) -> str:
        """What the setter answers."""
        return ask(self.port("setter"), f"{user}\n{text}\n".encode()).decode()

    def get(self, *target: str, **more: Any) -> Response:
        """The web server's response, as of `fetch`."""
        return fetch(self.port("web"), *target, **more)

    def rpc(self, body: bytes) -> str:
        """The XML that it answers to an XML-RPC request."""
        return self.get("/RPC2", method="POST", body=body).body.decode()

    def proc(self, key: str) -> list[str]:
        """The values of `key` in /proc/PID/status."""
        text = pathlib.Path(f"/proc/{self.pid}/status").read_text()
        return next(line for line in text.splitlines() if line.startswith(key + ":")).split()[1:]

    def threads(self) -> int:
        """How many it has."""
        return int(self.proc("Threads")[0])

    def descriptors(self) -> int:
        """How many it has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def resident(self) -> int:
        """Bytes of memory that it holds."""
        return int(self.proc("VmRSS")[0]) * 1024

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def end(self) -> int:
        """What it exits with, and that it has."""
        status = self.process.wait(DEADLINE)
        self.reader.join()
        return status

    def stop(self) -> int:
        """End it by SIGTERM; its exit status."""
        self.process.terminate()
        return self.end()

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.end()

    def close(self) -> None:
        """End it and remove its folder."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


class Case(unittest.TestCase):
    """What the tests share: whatever they start ends with them."""

    def launch(self, text: str = USERS, *options: str, **more: Any) -> Service:
        """A running fingerd."""
        service = Service(text, *options, **more)
        self.addCleanup(service.close)
        return service

    def refuses_to_start(self, words: list[str], pattern: str, **more: Any) -> None:
        """Checks that the command ends with status 1 and one line on stderr, with `pattern`."""
        status, out, err = run(words, **more)
        lines = [line for line in err if not re.match(r"\d{4}-.* (INFO|WARNING) ", line)]
        self.assertEqual((status, out, len(lines)), (1, [], 1), err)
        self.assertRegex(lines[0], f"^fingerd: .*{pattern}")

    def server(self, kind: Any, *arguments: Any, **limits: Any) -> Any:
        """A server in this process, on its `port`; some limits of its class may be others."""
        listener = fingerd.listen("finger", "127.0.0.1:0")
        server = type(kind.__name__, (kind,), limits)(listener, fingerd.Site(*arguments))
        server.port = listener.getsockname()[1]
        thread = threading.Thread(target=server.run)
        thread.start()
        self.addCleanup(thread.join)
        self.addCleanup(server.shutdown)
        return server

    def folder(self) -> pathlib.Path:
        """A new folder."""
        folder = new_folder()
        self.addCleanup(shutil.rmtree, folder, ignore_errors=True)
        return folder

    def keep(self, sock: Any) -> Any:
        """The socket (or database), which is closed at the end."""
        self.addCleanup(sock.close)
        return sock

    def patch(self, **values: Any) -> None:
        """Give some of fingerd's names other values."""
        patch = mock.patch.multiple(fingerd, **values)
        patch.start()
        self.addCleanup(patch.stop)

    def watch_log(self, level: str = "INFO") -> list[str]:
        """What fingerd logs in this process from now on; at the end there has to be something."""
        watch = self.assertLogs("fingerd", level)
        lines: list[str] = watch.__enter__().output
        self.addCleanup(watch.__exit__, None, None, None)
        return lines


# ================================================================================================
# 2. the house: the laws that its six rooms obey
# ================================================================================================

SOURCE = FINGERD.read_text(encoding="utf-8")
ROOMS = ["text", "codecs", "store", "answers", "services", "command line"]


class Uses:
    """The global names that a program uses and defines, with their lines; and what it imports.

    What the compiler makes of it tells: locals are none, and annotations are no code.
    """

    def __init__(self, source: str) -> None:
        self.found: list[tuple[str, int]] = []
        self.defined: dict[str, int] = {}
        self.imported: set[str] = set()
        self._read(compile(source, "", "exec"), 0)  # it inherits our __future__, as to annotations

    def _read(self, code: Any, line: int) -> None:
        lines = dict(dis.findlinestarts(code))
        for instruction in dis.get_instructions(code):
            line = lines.get(instruction.offset) or line
            operation, value = instruction.opname, instruction.argval
            if operation in ("LOAD_GLOBAL", "LOAD_NAME"):
                self.found.append((value, line))
            elif operation == "IMPORT_NAME":
                self.found.append((value.split(".")[0], line))
                self.imported.add(value.split(".")[0])
            elif operation == "STORE_NAME" and code.co_name == "<module>":
                self.defined.setdefault(value, line)
            elif hasattr(value, "co_code"):
                self._read(value, line)

    def too_early(self) -> list[tuple[str, int]]:
        """The uses above their definition."""
        return [use for use in self.found if use[1] < self.defined.get(use[0], 0)]


class LawsTest(Case):
    def setUp(self) -> None:
        self.uses = Uses(SOURCE)
        banners = re.finditer(r"^# =+\n# ([1-9])\. ([\w ]+): .+\n# =+$", SOURCE, re.MULTILINE)
        self.banners = [(match[2], SOURCE.count("\n", 0, match.start()) + 1) for match in banners]

    def room(self, line: int) -> int:
        """The number of the room that holds `line`, 0 above all."""
        return sum(start <= line for _, start in self.banners)

    def test_the_house_has_six_rooms(self) -> None:
        self.assertEqual([name for name, _ in self.banners], ROOMS)

    def test_a_name_is_used_only_below_its_definition(self) -> None:
        wrong = Uses(
            "def f(x: T, z=z):\n    y = 1\n    return g(x, y)\ndef g(): h\nh, z = T = 1, 2"
        )
        self.assertEqual(wrong.too_early(), [("z", 1), ("g", 3), ("h", 4)])
        self.assertEqual(self.uses.too_early(), [])

    def test_a_room_uses_only_rooms_above_it(self) -> None:
        uses = [(name, line) for name, line in self.uses.found if name in self.uses.defined]
        self.assertGreater(len(uses), 500)
        upward = [u for u in uses if self.room(self.uses.defined[u[0]]) > self.room(u[1])]
        self.assertEqual(upward, [])

    def test_text_codecs_and_answers_know_no_socket_thread_clock_or_log(self) -> None:
        services = {"socket", "threading", "time", "logging", "log"}
        uses = [(name, line) for name, line in self.uses.found if name in services]
        self.assertEqual([use for use in uses if self.room(use[1]) in (1, 2, 4)], [])
        self.assertTrue([use for use in uses if self.room(use[1]) == 5])

    def test_functions_and_lines_are_short(self) -> None:
        functions = [f for f in ast.walk(ast.parse(SOURCE)) if isinstance(f, ast.FunctionDef)]
        length = {f.name: (f.end_lineno or 0) - f.lineno + 1 for f in functions}
        self.assertEqual({name: lines for name, lines in length.items() if lines > 45}, {})
        self.assertEqual([line for line in SOURCE.splitlines() if len(line) > 100], [])

    def test_nothing_but_the_standard_library_is_imported(self) -> None:
        for path in (FINGERD, pathlib.Path(__file__)):
            for name in Uses(path.read_text(encoding="utf-8")).imported - {"fingerd"}:
                spec = importlib.util.find_spec(name)
                self.assertNotIn("-packages", str(spec and spec.origin), name)
                self.assertIn(name, getattr(sys, "stdlib_module_names", [name]))  # as of 3.10

    def test_the_top_level_is_five_files(self) -> None:
        if not shutil.which("git"):
            self.skipTest("no git here")
        status, paths, _ = run(["git", "-C", str(HERE), "ls-files"])
        if status:
            self.skipTest("no repository here")
        tops = {path.split("/")[0] for path in paths}
        five = {"fingerd.py", "test_fingerd.py", "users.example", "README.md", "Makefile"}
        self.assertEqual({top for top in tops if not top.startswith(".")} - five, set())


# ================================================================================================
# 3. codecs: tables of bytes and the whole value that each becomes
# ================================================================================================

Query, Setting, Request = fingerd.FingerQuery, fingerd.Setting, fingerd.HttpRequest
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"  # emoji that need their joiners


def raw(*lines: str, end: str = "\r\n") -> bytes:
    """A request head of these lines."""
    return (end.join(lines) + end * 2).encode("latin-1")


def parse_users(data: bytes) -> fingerd.UsersFile:
    """The content of a users file of these bytes."""
    return fingerd.parse_users(map(fingerd.clean_line, io.BytesIO(data)), {})


def parse_setting(data: bytes, ended: bool) -> Any:
    """What a client of the setter wants that has sent `data` at the second 1,000,000."""
    return fingerd.parse_setting(data, ended, 1_000_000.0)


def parse_json(data: bytes) -> fingerd.UsersFile:
    """The content of a list in JSON that is read at the second 1,000,000."""
    return fingerd.parse_json_list(data, {}, 1_000_000.0)


class CodecsTest(Case):
    def table(self, function: Callable[..., Any], rows: list[tuple[Any, Any]]) -> None:
        """Assert what `function` makes of each row's first part, the second."""
        for arguments, wanted in rows:
            with self.subTest(arguments):
                if not isinstance(arguments, tuple):
                    arguments = (arguments,)
                self.assertEqual(function(*arguments), wanted)

    def replay(self, parse: Callable[..., Any], data: bytes, wanted: Any, more: bytes) -> None:
        """Check a parser on `data` whole, with more behind it, and on each beginning of it."""
        for whole in (data, data + more):
            self.assertEqual(parse(whole, False), wanted)
        step = 1 if len(data) < 600 else 97
        for size in range(0, len(data), step):
            self.assertIsNone(parse(data[:size], False), data[:size])

    def test_text_becomes_one_printable_line(self) -> None:
        self.table(
            fingerd.clean,
            [
                ("", ""),
                (" a  b ", "a  b"),
                ("a\tb\t", "a b"),
                ("a\r\nb\x00\x1b[1m\x7f\x85\x9bc", "ab[1mc"),
                ("a\u2028b\u2029c\u202ed\u2066e\u2069f", "abcdef"),
                ("a\ud800b\udfffc\ufffed\uffffe\ufdd0f", "abcdef"),
                (FAMILY + " \u0646\u200c\u0647", FAMILY + " \u0646\u200c\u0647"),
                ("\u00a0zo\u00e9\u3000", "zo\u00e9"),
                ("\ufeffa\ufeff", "a"),
                (b" zo\xc3\xa9 ", "zo\u00e9"),
                (b"zo\xe9", "zo\ufffd"),
                ("zoe\u0301", "zo\u00e9"),
                ("zoe\u200b\u0301", "zo\u00e9"),
                ("e\u202e\u0301", "\u00e9"),
                ("e\u0301" * 1_000, "\u00e9" * 1_000),
                ("a" + "\u0301\u0323" * 300_000, "a" + "\u0301\u0323" * 300_000),
            ],
        )

    def test_bad_names_have_a_problem(self) -> None:
        for name in ("a", "John Doe", "zo\u00e9", "a/b", "a#", "...", "x" * 64, FAMILY):
            self.assertEqual(fingerd.entry_problem(name), "", name)
        for name in ("", "a:b", "a@b", "/a", "#a", ".", "..", "x" * 65, "a\ufffd"):
            self.assertNotEqual(fingerd.entry_problem(name), "", name)

    USERS_FILES: ClassVar = [
        (b"", {}),
        (b"\n \n# c\n  # c: d\n#\n", {}),
        (b"moshez: Happy and well\nshawn:alive", {"moshez": "Happy and well", "shawn": "alive"}),
        (b" a  b \t:  c : d \r\n", {"a  b": "c : d"}),
        (b"a: 1\nb: 2\n", {"a": "1", "b": "2"}),
        (b"\xef\xbb\xbfa: 1\n", {"a": "1"}),
        (b"\xef\xbb\xbf# a: 1\n", {}),
        ("\uff21da: 1\n".encode(), {"\uff21da": "1"}),  # begins with a byte of the BOM
        ("zo\u00e9: caf\u00e9\n".encode(), {"zo\u00e9": "caf\u00e9"}),
        ("a: \ufffd\n".encode(), {"a": "\ufffd"}),  # UTF-8, though strange
        (b"a: x\x1b[1my\x00\n", {"a": "x[1my"}),
        (b"a: " + b"x" * 1000, {"a": "x" * 1000}),
    ]
    BAD_USERS_LINES: ClassVar = [
        (b"no colon", "no colon"),
        (b": x", "no name"),
        (b"a@b: x", "a name holds no"),
        (b"/a: x", "a name holds no"),
        (b".: x", "a name holds no"),
        (b"x" * 65 + b": x", "the name is longer"),
        (b"a: " + b"x" * 1001, "the status is longer"),
        (b"a: " + b" " * 8192, "the line is longer"),
        (("a: " + "\U0001f468" * 99_999).encode(), "the line is longer"),
        (b"#" * 99_999, "the line is longer"),
        (b"a: caf\xe9", "not UTF-8"),
        (b"caf\xe9: \x1b", "not UTF-8"),
        (b"# caf\xe9", "not UTF-8"),
        (b"\xe9", "not UTF-8"),
        (b"a: \xed\xb2\x80", "not UTF-8"),  # a surrogate
    ]

    def test_a_bad_line_of_a_list_in_json_changes_no_time_of_a_good_one(self) -> None:
        good = b'[{"user": "a", "status": "b", "since": "1970-01-01T00:00:09Z"},\n'
        for more in (
            b'"since": "1970-01-02T00:00:00Z", "status": "%s"' % (b"x" * 1_001),
            b'"since": "1970-01-02T00:00:00Z", "status": "b", "until": "soon"',
            b'"since": "1970-01-02T00:00:00Z", "until": "2100-01-01T00:00:00Z", "status": 1',
        ):
            users = parse_json(good + b'{"user": "a", ' + more + b"}]\n")
            self.assertEqual((users.texts, len(users.problems)), ({"a": "b"}, 1), more)
            self.assertEqual((users.dates, users.ends), ({"a": 9.0}, {}), more)
        first = good.replace(b"}", b', "until": "1970-02-01T00:00:00Z"}')
        self.assertEqual(parse_json(first + b"]\n").ends, {"a": 31 * 86_400.0})
        self.assertEqual(parse_json(first + good[1:] + b"]\n").ends, {})

    def test_users_files(self) -> None:
        for data, texts in self.USERS_FILES:
            with self.subTest(data[:40]):
                wanted = fingerd.UsersFile(texts, [])
                self.assertEqual(parse_users(data), wanted)
        for line, problem in self.BAD_USERS_LINES:
            with self.subTest(line[:40]):
                users = parse_users(b"b: 1\n" + line + b"\nc: 2\n")
                self.assertEqual((users.texts, len(users.problems)), ({"b": "1", "c": "2"}, 1))
                self.assertTrue(users.problems[0].startswith(f"2: {problem}"), users.problems)
        users = parse_users(b"x\n" * 1000)
        self.assertEqual(len(users.problems), fingerd.MAX_PROBLEMS + 1)
        self.assertEqual(users.problems[-1], " ... and more bad lines")

    def test_the_last_line_for_a_user_counts(self) -> None:
        for data, texts in (
            (b"a: 1\nb: 2\na: 3\n", {"a": "3", "b": "2"}),
            (b"a: 1\n\na:\n", {"a": ""}),
        ):
            wanted = fingerd.UsersFile(texts, [], ["3: replaces an earlier line for a"])
            self.assertEqual(parse_users(data), wanted)
        users = parse_users(b"a: x\n" * 1000)
        self.assertEqual(len(users.repeated), fingerd.MAX_PROBLEMS)

    def test_a_json_list_is_parsed_back(self) -> None:
        rows = [
            [],
            [("a", "x", 1_000.0, None)],
            [("a/b# c", ': ["{\\,]', 1_000.0, 2_000.0), (FAMILY, "\u00e9 " * 500, 1.0, None)],
        ]
        for entries in rows:
            data = "".join(fingerd.json_list(fingerd.json_status(*each) for each in entries))
            wanted = fingerd.UsersFile(
                {user: text.strip() for user, text, _, _ in entries},
                [],
                dates={user: since for user, _, since, _ in entries},
                ends={user: until for user, _, _, until in entries if until},
            )
            with self.subTest(data[:40]):
                self.assertEqual(parse_json(data.encode()), wanted)

    def test_a_json_list_is_not_trusted(self) -> None:
        line = '{"user": "%s", "status": "%s", "since": %s}'
        now, ahead = 1_000_000.0, 1_000_000.0 + fingerd.MAX_AHEAD
        good = [
            (line % ("a\\u001b", "x\\ud800\\ny", '"1970-01-01T00:00:01Z"'), {"a": "xy"}, 1.0, None),
            (line % ("a", "", '"1970-01-12T13:47:00Z"'), {"a": ""}, now + 20, None),
            (line % ("a", "x", '"1970-01-12T13:48:00Z"'), {"a": "x"}, now, None),
            (line % ("a", "x", '"9999-12-31T23:59:59Z"'), {"a": "x"}, now, None),
            (line % ("a", "x", '"0001-01-01T00:00:00Z"'), {"a": "x"}, now, None),
            (
                line % ("a", "x", '"1970-01-01T00:00:01Z", "until": "9999-12-31T23:59:59Z"'),
                {"a": "x"},
                1.0,
                ahead,
            ),
        ]
        for text, texts, since, end in good:
            with self.subTest(text):
                got = parse_json(f"[{text}]\n".encode())
                wanted = (texts, [], {"a": since}, {"a": end} if end else {})
                self.assertEqual((got.texts, got.problems, got.dates, got.ends), wanted)
        day = '"1970-01-01T00:00:01Z"'
        bad = [
            *[line % (name, "x", day) for name in ("", "a:b", "#a", "/a", "..", "x" * 65)],
            *[line % ("a", "x" * 1001, day), line % ("a", "x" * 9000, day)],
            *[line % ("a", "x", time) for time in ("null", "0", '"now"', '"9" * 99', "1e999")],
            *["null", "7", "{}", '"a"', "x", "a: b", '{"a":' * 1600, '{"user": "a"}'],
            line % ("a", "x", day + ', "until": 5'),
            line % ("a", "x", day + ', "user": 1'),
            line % ("a", "x", day + ', "status": null'),
            line % ("a", "x", day + ","),
        ]
        for text in bad:
            with self.subTest(text[:60]):
                got = parse_json(f"[{text},\n{line % ('b', 'y', day)}]\n".encode())
                self.assertEqual((got.texts, len(got.problems)), ({"b": "y"}, 1))

    def test_a_line_of_a_text_list_is_parsed_back(self) -> None:
        for name, text in itertools.product(
            ("a", "zo\u00e9 b", "a#/"), ("x", "", ": y: #", FAMILY)
        ):
            line = f"{name}: {text}\n"
            self.assertEqual(parse_users(line.encode())[:2], ({name: text}, []))

    FINGER: ClassVar = [
        (b"", Query()),
        (b"  ", Query()),
        (b"moshez", Query("moshez")),
        (b"  moshez\t ", Query("moshez")),
        (b"John  Doe", Query("John  Doe")),
        (b"zo\xc3\xa9", Query("zo\u00e9")),
        (b"zo\xe9", Query("zo\ufffd")),
        (b"a\x1b[1mb\x9c", Query("a[1mb\ufffd")),
        (b"/W", Query("", True)),
        (b" /w ", Query("", True)),
        (b"/W moshez", Query("moshez", True)),
        (b"/w\t  moshez", Query("moshez", True)),
        (b"moshez /W", Query("moshez", True)),
        (b"moshez  /w ", Query("moshez", True)),
        (b"/Wmoshez", Query("/Wmoshez")),
        (b"moshez/W", Query("moshez/W")),
        (b"moshez@host", Query("moshez", host="host")),
        (b"/W moshez @ Host ", Query("moshez", True, "Host")),
        (b"moshez@host /W", Query("moshez", True, "host")),
        (b"@host", Query("", host="host")),
        (b"moshez@", Query("moshez", host="")),
        (b"moshez@a@b", Query("moshez", host="a@b")),
        (b"\xff\xfd\x01\xff\xfb\x1f moshez", Query("moshez")),
        (b"GET / HTTP/1.0", Query("GET / HTTP/1.0")),
        (b"x" * 511, Query("x" * 511)),
        (b"x" * 513, Query(too_long=True)),
    ]

    def test_finger_queries(self) -> None:
        for line, query in self.FINGER:
            with self.subTest(line):
                self.assertEqual(fingerd.parse_finger(line, True), query)
                if query.too_long:  # however it ends
                    self.assertEqual(fingerd.parse_finger(line, False), query)
                    continue
                for end in (b"\n", b"\r\n"):
                    self.replay(fingerd.parse_finger, line + end, query, b"and more\r\n")

    def test_a_finger_query_without_an_end_is_too_long_in_the_end(self) -> None:
        for endless in (b"x", b" ", b"\t", b"\r", b"\0", b"\xff", b"\xff\xf1", b"\xff\xfd\x01"):
            with self.subTest(endless):
                query = fingerd.parse_finger(endless * 100_000, False)
                self.assertEqual(query, Query(too_long=True))

    def test_settings(self) -> None:
        rows = [  # two lines without the end of the second, and that
            (b"moshez\nhi", b"\n", Setting("moshez", "hi")),
            (b" moshez \r\n hi\tyou ", b"\r\n", Setting("moshez", "hi you")),
            (b"moshez\n ", b"\n", Setting("moshez", "")),
            (b"moshez\r\n ", b"\r\n", Setting("moshez", "")),
            (b"\xef\xbb\xbfmoshez\nhi", b"\n", Setting("moshez", "hi")),  # from PowerShell
            (b"zo\xc3\xa9\ncaf\xe9\x1b", b"\n", Setting("zo\u00e9", "caf\ufffd")),
            (b"John Doe\n: @ /", b"\n", Setting("John Doe", ": @ /")),
            (b"moshez\n" + b"x" * 1000, b"\n", Setting("moshez", "x" * 1000)),
            (b"moshez: 2h\nhi", b"\n", Setting("moshez", "hi", "", 1_007_200.0)),
            (b" moshez:2h \r\nhi", b"\n", Setting("moshez", "hi", "", 1_007_200.0)),
            (b"moshez: 2h\n ", b"\n", Setting("moshez", "")),
        ]
        for data, end, setting in rows:
            with self.subTest(data):
                self.assertEqual(parse_setting(data, True), setting)
                self.replay(parse_setting, data + end, setting, b"more\nlines")

    def test_ends_of_messages(self) -> None:
        def seconds(text: str) -> float:
            return datetime.datetime.fromisoformat(text).timestamp()

        now, passed, far = seconds("2026-11-25 13:10:30"), "has passed", "over a year"
        for words, wanted in {
            "30m": "2026-11-25 13:40:30",
            "2h": "2026-11-25 15:10:30",
            "3d": "2026-11-28 13:10:30",
            "1w": "2026-12-02 13:10:30",
            "366d": "2027-11-26 13:10:30",
            "14:00": "2026-11-25 14:00:00",
            "9:05": "2026-11-26 09:05:00",
            "13:10": "2026-11-26 13:10:00",
            "13:11": "2026-11-25 13:11:00",
            "14:0": "2026-11-25 14:00:00",
            "00:00": "2026-11-26 00:00:00",
            "2026-11-25": "2026-11-26 00:00:00",
            "2026-12-31": "2027-01-01 00:00:00",
            "2026-12-1": "2026-12-02 00:00:00",
            "2026-12-24 14:00": "2026-12-24 14:00:00",
            "2027-11-25": "2027-11-26 00:00:00",
        }.items():
            with self.subTest(words):
                self.assertEqual(fingerd.end_of_message(words, now), (seconds(wanted), ""))
        for words, problem in {
            **dict.fromkeys(("0m", "000d", "2026-11-24", "2026-11-25 13:10", "1980-01-01"), passed),
            **dict.fromkeys(("367d", "999999w", "2027-11-27", "2028-01-01 00:00"), far),
        }.items():
            with self.subTest(words):
                found = fingerd.end_of_message(words, now)[1]
                self.assertRegex(found, f"{problem}.*: write 30m, 2h, 3d, 1w, 14:00, ")
        nothing = """|x|2|h|2 h|2H|-2h|+2h|2h30m|1.5h|1y|1s|9999999h|24:00|14:60|1400|14|14.00
            now|\u0662h|2026-11-31|2026-13-01|20261224|2026-12-24T14:00|2026-12-24 24:00
            2026-12-24 14:00:00|2026-12-24 14:00+02:00|2026-W52-4|24.12.2026|0000-01-01|9999-12-31
            moshez|14:00 2026-12-24|2h\x00|2h: x|12:00 pm"""
        for words in nothing.replace("\n", "|").split("|"):
            with self.subTest(words.strip()):
                found = fingerd.end_of_message(words.strip(), now)[1]
                self.assertRegex(found, "^no such time: write 30m")

    def test_a_time_of_day_that_comes_twice(self) -> None:
        self.addCleanup(time.tzset)
        zone = mock.patch.dict(os.environ, TZ="CET-1CEST,M3.5.0,M10.5.0/3")
        zone.start()
        self.addCleanup(zone.stop)
        time.tzset()
        for now, wanted in (
            ("2026-10-25 00:10", "2026-10-25 00:30"),
            ("2026-10-25 01:10", "2026-10-25 01:30"),
            ("2026-10-25 01:40", "2026-10-26 01:30"),
        ):
            seconds = datetime.datetime.fromisoformat(f"{now}+00:00").timestamp()
            end, problem = fingerd.end_of_message("02:30", seconds)
            self.assertEqual((fingerd.plain_time(end), problem), (f"{wanted} UTC", ""))

    def test_settings_that_cannot_be_honoured(self) -> None:
        for data in (b"", b"moshez", b"moshez\n"):
            with self.subTest(data):
                self.assertIsNone(parse_setting(data, False))
                self.assertTrue(parse_setting(data, True).problem)
        for line in (
            b"",
            b"  ",
            b":",
            b": 2h",
            b"a@b",
            b"a@b: 2h",
            b"/a",
            b"#a",
            b"..",
            b"x" * 65,
            b"\xe9",
        ):
            self.refuses_the_line(line, "name")
        for data in (b"moshez\n" + b"x" * 1001 + b"\n", b"x" * 8193, b"moshez\n" + b"\0" * 8192):
            with self.subTest(data[:20]):
                self.assertIn("long", parse_setting(data, False).problem)

    def refuses_the_line(self, line: bytes, problem: str) -> None:
        """Checks that the setter refuses a first line."""
        for end in (b"\nhi\n", b"\r\nhi\r\n"):
            with self.subTest(line + end):
                found = parse_setting(line + end, False).problem
                self.assertIn(problem, found)

    def test_the_first_line_holds_no_control_character(self) -> None:
        tls = b'\x16\x03\x01"'  # and the length of a ClientHello may end in LF
        for line in (tls, b"a\x1b[1mb", b"a\0", b"\x0ca", b"a\rb", b"\x7fa", b"\xc2\x9b2J"):
            self.refuses_the_line(line, "protocol")

    GREETINGS: ClassVar = """
        POST / HTTP/1.1|GET /moshez HTTP/1.0|PUT  HTTP/2|OPTIONS * HTTP/1.1|PRI * HTTP/2.0
        HTTP/1.1 200 OK|OPTIONS / RTSP/1.0|GET /|GET /moshez|HEAD *|EHLO localhost|HELO me
        220 mail.example.com ESMTP|220-FTP server ready|USER anonymous|PASS guest|AUTH TLS
        NICK moshez|USER moshez 0 * moshez|PASS secret|CAP LS|CAP LS 302|CAP REQ sasl
        SSH-2.0-OpenSSH_9.2|SSH-1.5-x|PROXY TCP4 192.0.2.1 192.0.2.2 1 2|<?xml version="1.0"?>|*1
    """

    def test_a_greeting_of_another_protocol_is_no_name(self) -> None:
        for line in self.GREETINGS.strip().replace("\n", "|").split("|"):
            for each in (line.strip(), line.strip().lower(), line.strip().upper()):
                self.refuses_the_line(each.encode(), "protocol")

    NAMES: ClassVar = """
        get|GET|post|head|user|USER|nick|NICK|pass|cap|ssh|http|ehlo|220|options|John\tDoe
        Nick Cave|Nick de Vries|Post Malone|Patch Adams|Head Office|Get Smart|Usher Raymond
        passenger 57|Cap Anson|Joe Login|John HTTP|Service Desk|*|a/b|<b>
    """

    def test_a_name_that_only_looks_like_a_greeting_can_be_set(self) -> None:
        for line in self.NAMES.strip().replace("\n", "|").split("|"):
            with self.subTest(line):
                setting = Setting(line.strip().replace("\t", " "), "hi")
                self.assertEqual(parse_setting(f"{line}\nhi\n".encode(), False), setting)

    HEADS: ClassVar = [  # request heads, and how they differ from a plain GET of /
        (raw("GET / HTTP/1.1", "Host: h"), {}),
        (raw("GET / HTTP/1.1", "Host: h", end="\n"), {}),
        (b"\r\n\n" + raw("GET / HTTP/1.1", "Host: h"), {}),
        (raw("GET / HTTP/1.9", "HOST:\t h \t"), {}),
        (raw("GET / HTTP/1.1", "Host:"), {"headers": {"host": ""}}),
        (raw("GET / HTTP/1.1", "Host: [::1]:80"), {"headers": {"host": "[::1]:80"}}),
        (raw("GET / HTTP/1.1", "Host: a_b.c.:1"), {"headers": {"host": "a_b.c.:1"}}),
        (
            raw("HEAD /a%20b?x=1?y HTTP/1.1", "Host: h"),
            {"method": "HEAD", "path": "/a%20b", "user": "a b", "query": "x=1?y"},
        ),
        (
            raw("GET http://h:8000/a?b HTTP/1.1", "Host: other"),
            {"path": "/a", "user": "a", "query": "b", "headers": {"host": "other"}},
        ),
        (raw("GET HTTP://h/ HTTP/1.1", "Host: h"), {}),
        (raw("GET https://h/?b HTTP/1.1", "Host: h"), {"query": "b"}),
        (
            raw("GET http://h/ HTTP/1.0"),
            {"headers": {}, "keep": False},
        ),
        (raw("GET //a HTTP/1.1", "Host: h"), {"path": "//a", "user": "/a"}),
        (
            raw("GET /zo\xc3\xa9\x85\xa0 HTTP/1.1", "Host: h"),
            {"path": "/zo\xc3\xa9\x85\xa0", "user": "zo\u00e9\ufffd\ufffd"},
        ),
        (raw("g3t! / HTTP/1.1", "Host: h"), {"method": "g3t!"}),
        (raw("GET / HTTP/1.0"), {"headers": {}, "keep": False}),
        (
            raw("GET / HTTP/1.0", "Connection: Keep-Alive"),
            {"headers": {"connection": "Keep-Alive"}},
        ),
        (
            raw("GET / HTTP/1.1", "Host: h", "Connection: TE, Close"),
            {"headers": {"host": "h", "connection": "TE, Close"}, "keep": False},
        ),
        (
            raw("GET / HTTP/1.1", "Host: h", "Connection: TE", "Connection: close"),
            {"headers": {"host": "h", "connection": "TE, close"}, "keep": False},
        ),
        (
            raw("GET / HTTP/1.1", "Host: h", "Connection: closed"),
            {"headers": {"host": "h", "connection": "closed"}},
        ),
        (
            raw("GET / HTTP/1.1", "Host: h", "Content-Length: 065536"),
            {"body": None, "headers": {"host": "h", "content-length": "065536"}},
        ),
        (
            raw("GET / HTTP/1.1", "Host: h", "Content-Length: " + "0" * 99),
            {"headers": {"host": "h", "content-length": "0" * 99}},
        ),
        (
            raw("GET / HTTP/1.1", "Host: h", "Expect: 100-Continue"),
            {"headers": {"host": "h", "expect": "100-Continue"}, "expects": True},
        ),
        (
            raw("GET / HTTP/1.0", "Expect: 100-continue"),
            {"headers": {"expect": "100-continue"}, "keep": False},
        ),
        (
            raw("GET / HTTP/1.1", "Host: h", "Expect: a miracle"),
            {"headers": {"host": "h", "expect": "a miracle"}},
        ),
        (
            raw("GET / HTTP/1.1", "Host: h", "X:", "a: \xe9\tb", "x: 1"),
            {"headers": {"host": "h", "x": ", 1", "a": "\xe9\tb"}},
        ),
        (
            raw("GET /" + "x" * 8178 + " HTTP/1.1", "Host: h"),
            {"path": "/" + "x" * 8178, "user": "x" * 512},
        ),
        (b"\r\n\n" + raw("GET / HTTP/1.1", "Host: h", end="\n"), {}),
    ]

    def test_request_heads(self) -> None:
        plain = {"method": "GET", "path": "/", "headers": {"host": "h"}}
        for data, more in self.HEADS:
            with self.subTest(data[:60]):
                wanted = Request(**{**plain, "keep": True, "size": len(data), **more})
                self.replay(
                    lambda data, _: fingerd.parse_http_request(data), data, wanted, b"body\n\n"
                )

    BAD_LINES: ClassVar = [
        "GET /",
        "GET",
        "/",
        "GET  / HTTP/1.1",
        "GET / HTTP/1.1 ",
        " GET / HTTP/1.1",
        "GET /a b HTTP/1.1",
        "GET\t/ HTTP/1.1",
        "G(T / HTTP/1.1",
        "GéT / HTTP/1.1",
        "GET / http/1.1",
        "GET / HTTP/1.10",
        "GET / HTTP/11",
        "GET / HTTP/1",
        "GET / HTTP/+1.1",
        "GET /\x00 HTTP/1.1",
        "GET /\x7f HTTP/1.1",
        "GET /\r HTTP/1.1",
        "GET / HTTP/1.1\r",
    ]
    BAD_TARGETS: ClassVar = [
        "moshez",
        "*",
        "ftp://h/",
        "http:/h",
        "http://",
        "http:///",
        "http://h",
        "?a",
        "http://:80/",
        "http://u@h/",
        "http://u:p@h/",
        "http://h#f",
        "http://a%41/",
        "http://[::1/",
        "/#f",
        "/a?b#f",
        "#",
        "h:80",
    ]
    BAD_HEADERS: ClassVar = [
        "Host: other",
        "Host : h",
        "no colon",
        ": x",
        "a b: c",
        "X: a\n folded",
        "X: a\rY: b",
        "X: a\x00b",
        "X: \x1b",
        "X: \x7f",
        "Xé: a",
        "X: a\r",
        "\tX: a",
        "X\t: a",
        "Content-Length: 5\nContent-Length: 5",
        "Content-Length: 5\nContent-Length: 6",
        "Content-Length: 5, 5",
        "Content-Length: +5",
        "Content-Length: -5",
        "Content-Length: 0x5",
        "Content-Length:",
        "Content-Length: 5 5",
        "Content-Length: ²",
        "Content-Length: 1_0",
        "Content-Length : 5",
    ]
    BAD_HOSTS: ClassVar = [
        "a b",
        "a, b",
        "a/b",
        "u@h",
        "]][[::",
        "%%%%",
        "[::1",
        "[]",
        "[::1]x",
        "h:80:80",
        "h:1234567",
        ":80",
        "h#",
    ]

    DOUBTFUL_CODINGS: ClassVar = [
        ["Content-Length: 5", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: chunked", "Content-Length: 0"],
        ["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: chunked, chunked"],
        ["Transfer-Encoding: chunked, gzip"],
        ["Transfer-Encoding: chunked,"],
        ["Transfer-Encoding : chunked"],
    ]
    OTHER_CODINGS: ClassVar = [
        "",
        ",",
        "identity",
        "xchunked",
        "gzip, chunked",
        ", chunked",
        "chunked;q=1",
        '"chunked"',
        "chunked\t x",
    ]

    def test_doubtful_request_heads_are_refused(self) -> None:
        get, host = "GET / HTTP/1.1", "Host: h"
        rows: list[tuple[int, list[str]]] = [
            *((400, [line, host]) for line in self.BAD_LINES),
            *((400, [f"GET {target} HTTP/1.1", host]) for target in self.BAD_TARGETS),
            *((400, [get, host, *lines.split("\n")]) for lines in self.BAD_HEADERS),
            *((400, [get, f"Host: {name}"]) for name in self.BAD_HOSTS),
            (400, [get]),
            (400, ["GET http://h/ HTTP/1.1"]),
            *((400, [f"GET / HTTP/{version}", host]) for version in ("0.9", "2.0", "3.1")),
            *((400, [get, host, *lines]) for lines in self.DOUBTFUL_CODINGS),
            (400, ["GET / HTTP/1.0", "Transfer-Encoding: chunked"]),
            *((501, [get, host, f"Transfer-Encoding: {coding}"]) for coding in self.OTHER_CODINGS),
            (413, [get, host, "Content-Length: 65537"]),
            (413, [get, host, "Content-Length: " + "9" * 99]),
            (400, [get, host, "Content-Length: " + "9" * 5000]),
            (431, ["GET /" + "x" * 16_384 + " HTTP/1.1", host]),
            (431, [get, host, "X: " + "x" * 16_384]),
            (431, [get, host, *["X: " + "x" * 5000] * 4]),
            (400, [get, host, *["X:"] * 100]),
        ]
        for status, lines in rows:
            with self.subTest([line[:60] for line in lines]):
                self.assertEqual(fingerd.parse_http_request(raw(*lines)), Request(status))

    def test_no_head_takes_long(self) -> None:
        for field in ("Connection: a", "Transfer-Encoding: chunked", "Host: h", "If-Match: a"):
            data = raw("GET / HTTP/1.1", "Host: h", field + " " * 16_000 + "b")
            began = time.process_time()
            request = fingerd.parse_http_request(data)
            page = fingerd.error_page(404)
            fingerd.is_wanted(request.headers, page)
            self.assertLess(time.process_time() - began, 0.2, field)

    def test_a_line_that_is_no_request_is_refused_at_once(self) -> None:
        for line in (b"GET /moshez\r\n", b"moshez\n", b"\r\nhello \r\n", b"\x16\x03\x01\n"):
            self.assertEqual(fingerd.parse_http_request(line), Request(400), line)
            self.assertIsNone(fingerd.parse_http_request(line[:-1]), line)

    def test_a_request_head_without_an_end_is_too_long_in_the_end(self) -> None:
        start = raw("GET / HTTP/1.1", "Host: h")[:-2]
        for data in (b"x" * 16_384, start + b"a:b\r\n" * 4000):
            self.assertEqual(fingerd.parse_http_request(data), Request(431))
        for endless in (b"\n", b"\r\n", b"\r", b" ", b"\0"):
            with self.subTest(endless):
                self.assertIsNotNone(fingerd.parse_http_request(endless * 100_000))

    CHUNKED: ClassVar = [  # bodies, and the data in them
        (b"0\r\n\r\n", b""),
        (b"5\r\nhello\r\n0\r\n\r\n", b"hello"),
        (b"5\r\nhel\r\n\r\n0\r\n\r\n", b"hel\r\n"),
        (b"00000005\r\nhello\r\n000\r\n\r\n", b"hello"),
        (b"a\r\n0123456789\r\nB\r\n0\r\n\r\n123456\r\n0\r\n\r\n", b"01234567890\r\n\r\n123456"),
        (b"5;a=b;c\r\nhello\r\n0;x\r\n\r\n", b"hello"),
        (b'5 \t;a="\xe9;"\r\nhello\r\n0 \r\n\r\n', b"hello"),
        (b"5;" + b"x" * 256 + b"\r\nhello\r\n0\r\n\r\n", b"hello"),
        (b"0\r\nHost: evil\r\nX:\r\n\r\n", b""),
        (b"5\r\nhello\r\n0\r\nX: " + b"x" * 4_000 + b"\r\n\r\n", b"hello"),
        (chunked(b"x" * 64, 1), b"x" * 64),
        (chunked(b"x" * 65_000, 9_999), b"x" * 65_000),
    ]
    BAD_CHUNKS: ClassVar = [
        (400, b"\r\n"),
        (400, b" 5\r\n"),
        (400, b"+5"),
        (400, b"-5"),
        (400, b"0x5"),
        (400, b"g"),
        (400, b"5\n"),
        (400, b"5\r\r"),
        (400, b"5\rx"),
        (400, b"5 5"),
        (400, b"5,"),
        (400, b"5_0"),
        (400, b"\xb2"),
        (400, b"000000005\r\n"),
        (400, b"fffffffff\r\n"),
        (400, b";a\r\n"),
        (400, b"5;a\x00"),
        (400, b"5;a\nb\r\n"),
        (400, b"5;" + b"x" * 257),
        (400, b"5" + b" " * 65),
        (400, b"5\r\nhello5"),
        (400, b"5\r\nhello\n"),
        (400, b"5\r\nhello\r\r"),
        (400, b"5\r\nhello!\r\n"),
        (400, b"0\r\nno colon\r\n"),
        (400, b"0\r\nX : y\r\n"),
        (400, b"0\r\nX: y\n"),
        (400, b"0\r\n folded: x\r\n"),
        (400, b"0\r\nX: \x00\r\n"),
        (400, b"0\r\n\n"),
        (413, b"10001\r\n"),
        (413, b"ffffffff\r\n"),
        (413, b"8000\r\n" + b"x" * 32_768 + b"\r\n8001\r\n"),
        (413, chunked(b"x" * 65, 1)),
        (400, b"0\r\n" + b"X: y\r\n" * 1_000),
        (400, b"0\r\nX: " + b"x" * 4_096),
    ]

    def test_request_bodies(self) -> None:
        top = raw("POST / HTTP/1.1", "Host: h", "Transfer-Encoding:\tChunked ")
        head = fingerd.parse_http_request(top)
        self.assertEqual(head.headers["transfer-encoding"], "Chunked")
        for data, body in self.CHUNKED:
            with self.subTest(data[:60]):
                wanted = head._replace(size=len(top + data), body=body)
                for behind in (b"", b"GET / HTTP/1.1\r\n\r\n", b"0\r\n\r\n", b"\r\n"):
                    self.assertEqual(fingerd.parse_http_request(top + data + behind), wanted)
                for size in range(0, len(data), 1 if len(data) < 500 else 97):
                    self.assertEqual(fingerd.parse_http_request(top + data[:size]), head)
        self.assertIsNone(head.body)
        top = raw("POST / HTTP/1.1", "Host: h", "Content-Length: 5")
        head = fingerd.parse_http_request(top + b"hell")
        self.assertIsNone(head.body)
        whole = fingerd.parse_http_request(top + b"hello!")
        self.assertEqual(whole, head._replace(size=len(top) + 5, body=b"hello"))

    def test_doubtful_request_bodies_are_refused(self) -> None:
        top = raw("POST / HTTP/1.1", "Host: h", "Transfer-Encoding: chunked")
        head = fingerd.parse_http_request(top)
        for status, data in self.BAD_CHUNKS:
            with self.subTest(data[:60]):
                bad, data = Request(status), top + data
                for behind in (b"\r\n\r\n", b"hello\r\n0\r\n\r\n", b"!" * 5_000):
                    self.assertEqual(fingerd.parse_http_request(data + behind), bad)
                sizes = range(len(top), len(data))
                found = [fingerd.parse_http_request(data[:size]) for size in sizes]
                self.assertEqual([each for each in found if each not in (head, bad)], [])

    def test_formats_are_chosen_by_query_and_accept(self) -> None:
        browser = "text/html,application/xhtml+xml,application/xml;q=0.9,image/webp,*/*;q=0.8"
        many = "image/*," * (fingerd.MAX_ACCEPT // 8)
        self.table(
            fingerd.choose_format,
            [
                (("", ""), "html"),
                (("", "*/*"), "html"),
                (("", browser), "html"),
                (("", "text/plain"), "text"),
                (("", "Text/Plain; charset=utf-8"), "text"),
                (("", "text/*"), "html"),
                (("", "text/*, text/html;q=0.1"), "text"),
                (("", "text/html;q=0.5, text/html;q=0.9, text/plain;q=0.7"), "html"),
                (("", "text/html;q=1.9, text/plain;q=0.5"), "text"),
                (("", "text/html;q=0.3, text/plain;q=0.4, */*"), "json"),
                (("", "application/json, text/html;q=0.9"), "json"),
                (("", "application/json, text/plain, */*"), "json"),  # axios
                (("", "text/plain, application/json, */*"), "text"),
                (("", "*/*, application/json"), "json"),
                (("", "text/*, application/json"), "json"),
                (("", "*/*, text/*"), "html"),
                (("", "application/*;q=0.5, text/plain;q=0.4"), "json"),
                (("", "application/atom+xml"), "atom"),
                (("", "application/rss+xml"), "atom"),
                (("", "application/xml, text/xml;q=0.9, */*;q=0.1"), "atom"),
                (("", "application/atom+xml;q=0, application/xml"), ""),
                (("", "text/html;q=0, */*;q=0.1"), "text"),
                (("", "image/png"), ""),
                (("", "application/json;q=0"), ""),
                (("", "nonsense;;q=x,,"), ""),
                (("", many[9:] + "text/html"), "html"),
                (("", many + "text/html"), ""),
                (("format=json", "text/html"), "json"),
                (("a=b&format=atom", ""), "atom"),
                (("format=text", "image/png"), "text"),
                (("format=xml", "text/html"), ""),
                (("other=json", "text/plain"), "text"),
            ],
        )

    def test_addresses_in_a_status_are_links(self) -> None:
        for text, wanted in [
            ("see http://a.example/b?c=d&e", "see [http://a.example/b?c=d&amp;e]"),
            ("https://a.example.", "[https://a.example]."),
            ("(http://a/b), http://c!", "([http://a/b]), [http://c]!"),
            ("http://a/b_(c)?", "[http://a/b_(c)]?"),
            ("http://\u00e9.example/\u00e9", "[http://\u00e9.example/\u00e9]"),
            ("http://a http://b", "[http://a] [http://b]"),
            ('"http://a/"onclick="x', "&quot;[http://a/]&quot;onclick=&quot;x"),
            ("<http://a/'><script>", "&lt;[http://a/]&#x27;&gt;&lt;script&gt;"),
            ("http:// https://... http://)", "http:// https://... http://)"),
            ("javascript:alert(1) ftp://a data:x", "javascript:alert(1) ftp://a data:x"),
            ("xhttp://a", "x[http://a]"),
        ]:
            with self.subTest(text):
                link = r'<a href="\1" rel="nofollow noopener">\1</a>'
                wanted = re.sub(r"\[(.*?)\]", link, wanted)
                self.assertEqual(fingerd.html_status(text), wanted)
        slow = "http://" + "(" * 990
        self.assertEqual(fingerd.html_status(slow), slow)

    def test_unknown_encodings_are_not_remembered(self) -> None:
        known = len(vars(encodings)["_cache"])
        for n in range(50):
            body = CALL.replace(b"?>", f" encoding='utf{n}-{'x' * 9_000}'?>".encode(), 1)
            self.assertTrue(fingerd.parse_rpc_call(body).fault)
        self.assertEqual(len(vars(encodings)["_cache"]), known)

    ENCODINGS: ClassVar = """utf-8 UTF8 utf_8 ascii US-ASCII latin-1 Latin1 iso8859-1 iso_8859-1
        ISO-8859-1 iso-8859-15 latin9 cp1252 windows-1252 windows-1251 CP1251 koi8-r KOI8-U cp437
        cp850 macintosh"""

    def test_usual_encodings_are_read(self) -> None:
        for name in self.ENCODINGS.split():
            for user in ("moshez", "zo\u00e9", "\u0436"):
                with self.subTest(name, user=user):
                    text = xmlrpc.client.dumps((user,), "f")
                    try:
                        plain = text[22:].encode(name)
                        data = text.replace("?>", f" encoding='{name}'?>", 1).encode(name)
                    except UnicodeEncodeError:
                        continue
                    self.assertEqual(fingerd.parse_rpc_call(data)[:2], ("f", (user,)))
                    said = fingerd.parse_rpc_call(plain, f'text/xml; Charset="{name}"; x=y')
                    self.assertEqual(said[:2], ("f", (user,)))
        latin = CALL.replace(b"?>", b" encoding='latin-1'?>").replace(b"moshez", b"zo\xe9")
        both = fingerd.parse_rpc_call(latin, "text/xml; charset=utf-8")
        self.assertEqual(both.params, ("zo\u00e9",))
        for content_type in ("text/xml; charset=martian", "text/xml;charset=utf-7"):
            fault = fingerd.parse_rpc_call(CALL, content_type).fault
            self.assertEqual(fault.faultCode, fingerd.UNKNOWN_ENCODING)

    def test_a_path_names_a_user(self) -> None:
        self.table(
            lambda path: fingerd.parse_http_request(raw(f"GET {path} HTTP/1.0")).user,
            [
                ("/moshez", "moshez"),
                ("/", ""),
                ("/John%20Doe", "John Doe"),
                ("/a+b", "a+b"),
                ("/a/b%2Fc", "a/b/c"),
                ("/zo%c3%a9", "zo\u00e9"),
                ("/zo\xc3\xa9", "zo\u00e9"),
                ("/zo%e9", "zo\ufffd"),
                ("/a%0d%0aB%00", "aB"),
                ("/100%", "100%"),
                ("/%zz", "%zz"),
            ],
        )

    def test_rpc_calls(self) -> None:
        name = "<methodName>f</methodName>"
        call = f"<methodCall>{name}%s</methodCall>"
        param = "<params><param><value>%s</value></param></params>"
        fault = "<value><struct><member><name>faultCode</name><value><int>1</int></value></member>"
        fault += "<member><name>faultString</name><value>x</value></member></struct></value>"
        nested = "<array><data><value>" * 2000 + "</value></data></array>" * 2000
        accent = (call % param % "\u00e9").encode
        bad = fingerd.PARSE_ERROR
        latin = b'<?xml version="1.0" encoding="iso-8859-1"?>' + accent("latin-1")
        rows: list[tuple[bytes, Any]] = [  # a body, and what it calls or the code of its fault
            (xmlrpc.client.dumps(("a", 1, [{}]), "f").encode(), ("f", ("a", 1, [{}]))),
            ((call % "").encode(), ("f", ())),
            ((call % "<params/>").encode(), ("f", ())),
            (accent(), ("f", ("\u00e9",))),
            (latin, ("f", ("\u00e9",))),
            (b"\xef\xbb\xbf<?xml version='1.0'?>" + accent(), ("f", ("\u00e9",))),
            ((call % param % "<base64>YQ==</base64>").encode(), ("f", (b"a",))),
            (b"", bad),
            (b"hello", bad),
            (b"<methodCall>", bad),
            (accent("latin-1"), bad),
            (b"<!DOCTYPE methodCall>" + accent(), bad),
            (b"<!DOCTYPE a [<!ENTITY b 'c'>]>" + accent(), bad),
            (b"<?xml version='1.0' encoding='martian'?>" + accent(), fingerd.UNKNOWN_ENCODING),
            (b"<?xml version='1.0' encoding='utf-16'?>" + accent(), fingerd.UNKNOWN_ENCODING),
            (accent().replace(b">f<", b"> f\r\n<"), ("f", ("\u00e9",))),
            ((call % param % "<int>x</int>").encode(), bad),
            ((call % param % "<base64>a</base64>").encode(), bad),
            ((call % param % "<boolean>2</boolean>").encode(), bad),
            (f"<methodResponse>{param % 'x'}</methodResponse>".encode(), bad),
            (f"<methodResponse><fault>{fault}</fault></methodResponse>".encode(), bad),
            (f"<methodCall>{name}<fault>{fault}</fault></methodCall>".encode(), bad),
        ]
        for body, wanted in rows:
            with self.subTest(body[:80]):
                got = fingerd.parse_rpc_call(body)
                self.assertEqual(got.fault.faultCode if got.fault else got[:2], wanted)
        for value in (nested, f"<int>{'9' * 60_000}</int>"):  # a call or a fault, and soon
            got = fingerd.parse_rpc_call((call % param % value).encode())
            self.assertTrue(got.fault or got.method)


# ================================================================================================
# 4. store: whoever spoke last is heard, and what was set outlives the process
# ================================================================================================


class StoreTest(Case):
    FILE: ClassVar = {"moshez": "file", "shawn": "alive", "mute": ""}

    def setUp(self) -> None:
        self.store = make_store(self.FILE)

    def load(self, when: float, **texts: str) -> None:
        self.store.replace_file(fingerd.UsersFile(texts, []), when)

    def test_a_hidden_message_is_found_whatever_its_case(self) -> None:
        self.store.set("moshez", "mine")
        self.load(2000.0, shawn="alive")
        self.assertEqual(self.store.set("MOSHEZ", "second"), "moshez")
        self.assertEqual(self.store.set("Moshez", ""), "moshez")
        self.load(3000.0, **self.FILE)
        self.assertEqual(texts_of(self.store), {"moshez": "file", "shawn": "alive"})

    def test_users_are_sorted_and_have_a_status(self) -> None:
        for user in ("zed", "amy", "mute"):
            self.store.set(user, "set")
        self.assertEqual(list(texts_of(self.store)), ["amy", "moshez", "mute", "shawn", "zed"])
        self.assertEqual(self.store.now.size(), 5)
        self.store.set("mute", "")
        now = self.store.now
        self.assertEqual((now.get("mute").text, now.get("nobody").text), ("", ""))
        self.assertNotIn("mute", texts_of(self.store))

    def test_the_most_recent_change_wins(self) -> None:
        edit, undo, other = {"moshez": "edited"}, {"moshez": "file"}, {"shawn": "other"}
        rows: list[tuple[str, list[Any], dict[str, str]]] = [  # messages and contents of the file
            ("a message over a line", ["mine", {**undo, **other}], {"moshez": "mine", **other}),
            ("the line is edited", ["mine", edit], edit),
            ("and edited back", ["mine", edit, undo], undo),
            ("the line is gone", ["mine", other], other),
            ("and comes back", ["mine", other, undo], {"moshez": "mine"}),
            ("or comes back with another text", ["mine", other, undo, {}, edit], edit),
            ("the message is taken back", ["mine", ""], {"moshez": "file", "shawn": "alive"}),
            ("over a line without a status", [{"moshez": ""}, "mine", ""], {}),
            ("over no line", [{}, "mine", ""], {}),
            ("there is still no line", [{}, "mine", other], {"moshez": "mine", **other}),
            ("a line appears", [{}, "mine", {"moshez": ""}], {}),
            ("and goes", [{}, "mine", {"moshez": ""}, {}], {}),
        ]
        for title, events, shown in rows:
            with self.subTest(title):
                store = make_store(self.FILE)
                for when, event in enumerate(events, 2000):
                    if isinstance(event, str):
                        store.set("moshez", event)
                    else:
                        store.replace_file(fingerd.UsersFile(dict(event), []), when)
                self.assertEqual(store.now.get("moshez").text, shown.get("moshez", ""))
                self.assertEqual(texts_of(store), shown)

    def test_since_is_when_the_text_became_visible(self) -> None:
        self.assertEqual(self.store.now.get("moshez"), fingerd.Status("file", 1000.0))
        self.load(2000.0, moshez="file", shawn="new")
        self.assertEqual(self.store.now.get("moshez"), fingerd.Status("file", 1000.0))
        self.assertEqual(self.store.now.get("shawn"), fingerd.Status("new", 2000.0))
        before = time.time()
        self.store.set("moshez", "mine")
        since = self.store.now.get("moshez").since
        self.assertTrue(before <= since <= time.time())
        self.load(3000.0, moshez="file")
        self.assertEqual(self.store.now.get("moshez"), fingerd.Status("mine", since))

    def test_changes_come_oldest_first_and_only_if_something_shows(self) -> None:
        start = self.store.now.version
        self.assertEqual(self.store.changes_after(0), [])  # the first load is no news
        self.store.set("moshez", "mine")
        self.store.set("moshez", "mine")
        middle = self.store.now.version
        self.load(2000.0, moshez="file", shawn="new", mute="")
        self.store.set("moshez", "")
        self.store.set("nobody", "")
        changes = self.store.changes_after(start)
        wanted = [("moshez", "mine"), ("shawn", "new"), ("moshez", "file")]
        self.assertEqual([change[1:] for change in changes], wanted)
        versions = [change[0] for change in changes]
        self.assertEqual(versions, sorted(set(versions)))
        self.assertEqual(
            [user for _, user, _ in self.store.changes_after(middle)], ["shawn", "moshez"]
        )
        self.assertEqual(self.store.changes_after(self.store.now.version), [])
        for number in range(1000):
            self.store.set("moshez", str(number))
        self.assertEqual(len(self.store.changes_after(0)), fingerd.MAX_CHANGES)

    def test_names_are_found_as_people_type_them(self) -> None:
        texts = {
            "moshez": "a",
            "Shawn": "b",
            "Ann": "c",
            "ann": "d",
            "stra\u00dfe": "e",
            "Mute": "",
        }
        many = {f"User{number:04}": "x" for number in range(3000)}
        self.store = make_store({**texts, **many, "gone": "x"})
        for user in ("Guest", "mute", "gone"):
            self.store.set(user, "here")
        self.load(2000.0, **texts, **many, Gone="")  # the message is hidden
        rows = [
            *[(name, "moshez") for name in ("moshez", "Moshez", "MOSHEZ")],
            *[(name, "Shawn") for name in ("Shawn", "shawn", "sHAWN")],
            *[(name, name) for name in ("Ann", "ann")],
            *[(name, "") for name in ("ANN", "", "zed", "~", "moshez ", "User")],
            *[(name, "Mute") for name in ("Mute", "mute", "MUTE")],
            *[(name, "stra\u00dfe") for name in ("stra\u00dfe", "STRASSE", "Strasse")],
            *[(name, "Guest") for name in ("Guest", "guest", "GUEST")],
            *[(name, "Gone") for name in ("gone", "GONE")],
            *[(name.upper(), name) for name in many],
        ]
        find = self.store.now.find
        self.assertEqual([(name, find(name)) for name, _ in rows], rows)
        self.load(3000.0, moshez="a", guest="file")
        find = self.store.now.find
        rows = [("shawn", ""), ("guest", "guest"), ("Guest", "Guest"), ("GUEST", ""), ("ANN", "")]
        self.assertEqual([(name, find(name)) for name, _ in rows], rows)

    def test_two_spellings_of_a_new_name_make_one_user(self) -> None:
        begun, go_on = threading.Event(), threading.Event()
        state = mock.Mock(messages={}, lines={})
        self.store.restore(state)
        state.write.side_effect = lambda *_: begun.set() or go_on.wait()
        with ThreadPoolExecutor(4) as pool:
            pool.submit(self.store.set, "first", "x")
            begun.wait()
            for name in ("Guest", "guest", "GUEST"):
                waiting = len(self.store._orders)
                pool.submit(self.store.set, name, f"set as {name}")
                until(lambda: len(self.store._orders) > waiting)  # noqa: B023  # called here
            go_on.set()
        self.assertEqual(texts_of(self.store)["Guest"], "set as GUEST")
        self.assertEqual(self.store.now.size(), 4)

    def test_a_message_comes_to_its_end(self) -> None:
        end, store = time.time() + 1_000, self.store
        for user, until in (("moshez", end), ("guest", end + 1), ("shawn", end), ("mute", None)):
            store.set(user, "mine", until=until)
        store.set("shawn", "for good")
        self.assertEqual(store.now.get("moshez").until, end)
        for moment, users in (
            (end - 1, {"moshez": "mine", "guest": "mine"}),
            (end, {"moshez": "file", "guest": "mine"}),
            (end + 1, {"moshez": "file"}),
            (end - 500, {"moshez": "file"}),  # a clock that was put back
        ):
            before, old = texts_of(store), store.now.version
            store.expire(moment)
            self.assertEqual(texts_of(store), {**users, "mute": "mine", "shawn": "for good"})
            changed = store.now.version > old
            self.assertEqual(changed, before != texts_of(store))
        texts = [text for _, user, text in store.changes_after(0) if user == "moshez"]
        self.assertEqual(texts[-1], "file")
        self.assertEqual(store.now.get("moshez"), fingerd.Status("file", 1000.0))
        store.set("moshez", "again", until=end + 9)
        store.expire(end + 8)
        self.assertEqual(store.now.get("moshez").text, "again")
        self.load(2000.0, shawn="alive")
        store.expire(end + 9)
        self.load(3000.0, moshez="file")
        self.assertEqual(store.now.get("moshez").text, "file")

    def test_a_snapshot_never_changes(self) -> None:
        now = self.store.now
        self.store.set("moshez", "mine")
        self.load(2000.0, zed="new")
        users = [(user, status.text) for user, status in now.users()]
        self.assertEqual(users, [("moshez", "file"), ("shawn", "alive")])


class StateFileTest(Case):
    def setUp(self) -> None:
        self.path = self.folder() / "state.db"

    def run_over(self, **texts: str) -> Any:
        """A store over this users file, and the messages of those that ran before."""
        return make_store(texts, fingerd.StateFile(self.path))

    def test_times_that_a_wrong_clock_has_left_are_put_right(self) -> None:
        store = self.run_over(moshez="file")
        with mock.patch("time.time", return_value=4e9):
            store.replace_file(fingerd.UsersFile({"moshez": "new"}, []), time.time())
            store.set("guest", "here", until=4.1e9)
        store._state.close()
        store = self.run_over(moshez="new")
        self.assertEqual(set(texts_of(store)), {"guest", "moshez"})
        for user, status in store.now.users():
            self.assertLessEqual(status.since, time.time(), user)
        self.assertLessEqual(store.now.changed, time.time())
        store._state.close()

    def test_messages_are_there_after_a_restart(self) -> None:
        for _ in range(3):
            store = self.run_over(moshez="file", shawn="alive")
            seen = texts_of(store)
            store.set("moshez", "mine", "127.0.0.1")
            store.set("zo\u00e9", FAMILY)
            store.set("shawn", "busy")
            store.set("shawn", "")
            store._state.close()
        self.assertEqual(seen, {"moshez": "mine", "shawn": "alive", "zo\u00e9": FAMILY})

    def test_an_edit_while_the_service_is_down_wins(self) -> None:
        for text in ("file", "edited", "file"):
            store = self.run_over(moshez=text)
            seen = texts_of(store)
            if text != "edited":
                store.set("moshez", "mine")
            store._state.close()
            self.assertEqual(seen, {"moshez": text})

    def test_a_message_that_could_not_be_removed_is_removed_later(self) -> None:
        store = self.run_over(moshez="file")
        store.set("moshez", "mine")
        db = self.keep(sqlite3.connect(self.path, isolation_level=None))
        db.execute("BEGIN IMMEDIATE")
        with self.assertLogs("fingerd", "WARNING"):
            store.replace_file(fingerd.UsersFile({"moshez": "edited"}, []), 2000.0)
        self.assertEqual(texts_of(store), {"moshez": "edited"})
        db.execute("ROLLBACK")
        store.set("guest", "here")
        store._state.close()
        store = self.run_over(moshez="file")
        self.assertEqual(texts_of(store), {"moshez": "file", "guest": "here"})
        store._state.close()

    def test_what_a_failed_commit_has_left_is_removed_later(self) -> None:
        store = self.run_over(moshez="file")
        self.addCleanup(store._state.close)
        store.set("moshez", "mine")
        db = self.keep(sqlite3.connect(self.path, isolation_level=None))
        db.execute("PRAGMA wal_autocheckpoint = 0")  # the database itself does not change
        db.execute("BEGIN IMMEDIATE")
        with self.assertLogs("fingerd", "ERROR"), self.assertRaises(fingerd.NotKept):
            store.set("zed", "refused")
        db.execute("INSERT INTO messages VALUES ('zed', 'refused', 1.0, NULL, 'x', NULL)")
        db.execute("COMMIT")
        store.set("moshez", "second")
        rows = db.execute("SELECT user, text FROM messages").fetchall()
        self.assertEqual(rows, [("moshez", "second")])

    def test_a_message_that_came_to_its_end_while_the_service_was_down(self) -> None:
        store, now = self.run_over(moshez="file"), time.time()
        store.set("guest", "mine", until=now + 1_000)
        with mock.patch("time.time", return_value=now - 10):
            store.set("moshez", "mine", until=now + 10)
        self.assertEqual(texts_of(store), {"moshez": "mine", "guest": "mine"})
        store._state.close()
        for _ in range(2):
            with mock.patch("time.time", return_value=now + 20):
                store = self.run_over(moshez="file")
            self.assertEqual(texts_of(store), {"moshez": "file", "guest": "mine"})
            self.assertEqual(store.now.get("guest").until, now + 1_000)
            self.assertEqual(store.changes_after(0), [])
            store._state.close()
        store = self.run_over()
        store.expire(now + 1_000)
        store._state.close()
        db = self.keep(sqlite3.connect(self.path))
        self.assertEqual(db.execute("SELECT user FROM messages").fetchall(), [])
        store = self.run_over(moshez="file")
        with mock.patch("time.time", return_value=now - 10):
            store.set("moshez", "mine", until=now - 1)
        self.assertEqual(db.execute("SELECT user FROM messages").fetchall(), [("moshez",)])
        store.set("guest", "here")  # a commit takes with it what has expired
        self.assertEqual(db.execute("SELECT user FROM messages").fetchall(), [("guest",)])
        store._state.close()

    VERSION_1: ClassVar = """
        PRAGMA journal_mode = WAL; PRAGMA application_id = 0x46494E47; PRAGMA user_version = 1;
        CREATE TABLE messages (user TEXT PRIMARY KEY, text TEXT NOT NULL, since REAL NOT NULL,
            covers TEXT, set_by TEXT NOT NULL) WITHOUT ROWID;
        INSERT INTO messages VALUES ('moshez', 'mine', 1700000000.25, 'file', '127.0.0.1'),
            ('zoe\u0301', 'cafe\u0301', 1700000001.0, NULL, '::1'), ('shawn', 'x', 1.0, 'old', 'x'),
            ('amy', 'mine', 1700000002.0, 'cafe\u0301', '::1');  -- not yet in NFC
    """

    def test_a_file_of_version_1_is_taken_over(self) -> None:
        db = sqlite3.connect(self.path)
        db.executescript(self.VERSION_1)
        db.close()
        texts = {"moshez": "file", "shawn": "alive", "amy": "caf\u00e9"}
        wanted = {"moshez": "mine", "shawn": "alive", "amy": "mine", "zo\u00e9": "caf\u00e9"}
        for _ in range(2):
            store = self.run_over(**texts)
            self.assertEqual(texts_of(store), wanted)
            self.assertEqual(store.now.get("moshez"), fingerd.Status("mine", 1700000000.25))
            store._state.close()
        store = self.run_over(**texts)
        store.set("shawn", "new", "::1", 1e12)
        for user in ("zo\u00e9", "amy"):
            store.set(user, "")
        store._state.close()
        db = self.keep(sqlite3.connect(self.path))
        self.assertEqual(db.execute("PRAGMA user_version").fetchone(), (2,))
        rows = db.execute("SELECT user, covers, set_by, until FROM messages").fetchall()
        wanted_rows = [("moshez", "file", "127.0.0.1", None), ("shawn", "alive", "::1", 1e12)]
        self.assertEqual(rows, wanted_rows)

    def since(self, when: float, **texts: str) -> dict[str, float]:
        """The dates in a store whose file has said this since `when`."""
        store = fingerd.StatusStore()
        store.replace_file(fingerd.UsersFile(texts, []), when)
        store.restore(fingerd.StateFile(self.path))
        self.addCleanup(store._state.close)
        store._state.close()
        return {user: status.since for user, status in store.now.users()}

    def test_lines_keep_their_dates_over_a_restart(self) -> None:
        self.assertEqual(self.since(1.0, a="x", b="x"), {"a": 1.0, "b": 1.0})
        self.assertEqual(self.since(2.0, a="x", b="y", c="z"), {"a": 1.0, "b": 2.0, "c": 2.0})
        self.assertEqual(self.since(3.0, a="x", b="y", c="", d=""), {"a": 1.0, "b": 2.0})
        self.assertEqual(self.since(4.0, b="y", c="z"), {"b": 2.0, "c": 4.0})
        store = self.run_over(b="y", c="z")
        texts = {"a": "x", "b": "new", "c": "z", "e": ""}
        store.replace_file(fingerd.UsersFile(texts, []), 5000.0)
        store._state.close()
        wanted = {"a": 5000.0, "b": 5000.0, "c": 4.0}
        self.assertEqual(self.since(6.0, a="x", b="new", c="z"), wanted)
        store, state = make_store({"a": "x", "b": "new", "c": "z"}), fingerd.StateFile(self.path)
        db = self.keep(sqlite3.connect(self.path))
        versions = [db.execute("PRAGMA data_version").fetchone()]
        for change in (lambda: store.restore(state), lambda: store.set("b", "mine")):
            change()
            versions.append(db.execute("PRAGMA data_version").fetchone())
        store.set("b", "")
        store._state.close()
        self.assertEqual(versions[0], versions[1], "nothing is written if nothing changed")
        self.assertNotEqual(versions[1], versions[2])
        self.patch(MAX_DATED=2)
        self.since(7.0, a="x", b="new", c="z")  # which are too many: the dates are not kept
        self.assertEqual(self.since(8.0, a="x", b="new", c="z"), {"a": 8.0, "b": 8.0, "c": 8.0})
        self.assertEqual(self.since(9.0, a="x", b="new"), {"a": 9.0, "b": 9.0})


# ================================================================================================
# 5. users file: read in this process, look by look
# ================================================================================================


class UsersFileTest(Case):
    """`look` is what the timer does each time, `reload` what SIGHUP has it do."""

    def setUp(self) -> None:
        self.path = self.folder() / "users"
        put(self.path, "moshez: old\n")
        self.store = fingerd.StatusStore()
        self.begin(self.path, 3600.0)
        self.logged = self.watch_log()
        self.reloader.load(at_once=True)

    def begin(self, path: pathlib.Path, interval: float) -> None:
        self.source = fingerd.FileSource(path)
        self.reloader = fingerd.Reloader(self.source, self.store, interval)

    def reload(self) -> None:
        self.reloader.look(at_once=True)

    def text(self) -> str | None:
        return texts_of(self.store).get("moshez")

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, line)) for line in self.logged)

    def test_a_swapped_symlink_is_noticed(self) -> None:
        folder = self.path.parent
        for name in ("a", "b"):
            (folder / name).write_text(f"moshez: {name}\n")
            os.utime(folder / name, (1_000_000_000, 1_000_000_000))  # even if equally old
        self.begin(folder / "link", 3600.0)
        for name in ("a", "b"):
            (folder / "new").symlink_to(name)
            os.replace(folder / "new", folder / "link")
            self.reloader.look()
            self.assertEqual(self.text(), name)

    def test_an_unchanged_file_is_read_only_when_asked(self) -> None:
        with mock.patch("fingerd.parse_users", wraps=fingerd.parse_users) as parse:
            self.reloader.look()
            self.assertEqual(parse.call_count, 0)
            self.reload()
            self.assertEqual(parse.call_count, 1)

    def test_a_young_file_is_put_off_unless_asked(self) -> None:
        self.patch(SETTLE_SECONDS=3600.0)
        waits: list[float] = []
        then: list[str] = []

        def sleep(seconds: float) -> None:
            waits.append(seconds)
            for text in then:
                put(self.path, text, age=7200.0)

        put(self.path, "moshez: half", age=0.0)
        with mock.patch("time.sleep", sleep):
            self.reloader.look()
            self.assertEqual((self.text(), waits), ("old", [3600.0]))
            self.reload()
            self.assertEqual((self.text(), waits), ("half", [3600.0]))
            then.append("moshez: whole\n")
            self.reloader.look()
            self.assertEqual((self.text(), waits), ("whole", [3600.0] * 2))

    def test_a_file_that_changes_as_it_is_read_is_put_off(self) -> None:
        def read(path: pathlib.Path) -> bytes:
            data = original(path)
            put(path, "moshez: whole\n")
            return data

        original = pathlib.Path.read_bytes
        put(self.path, "moshez: half")
        with mock.patch("pathlib.Path.read_bytes", read):
            self.reloader.look()
        self.assertEqual(self.text(), "old")
        self.reloader.look()
        self.assertEqual(self.text(), "whole")

    def test_a_lost_file_stays_in_force_and_is_logged_once(self) -> None:
        for round_ in (1, 2):
            self.path.unlink()
            for _ in range(3):
                self.reloader.look()
                self.reload()
            self.assertEqual((self.text(), self.count("No such file")), ("old", round_))
            put(self.path, "moshez: old\n")
            for _ in range(3):
                self.reload()
                self.reloader.look()
            self.assertEqual(self.count("^INFO:.* can be read again"), round_)

    def test_a_monitor_sees_what_is_wrong(self) -> None:
        service = self.launch()
        self.assertNotIn("fingerd-problem", service.get("/").headers)
        service.users.unlink()
        service.signal(signal.SIGHUP)
        until(lambda: service.get("/").headers.get("fingerd-problem") == "users file")
        db = self.keep(sqlite3.connect(service.state, isolation_level=None))
        db.execute("BEGIN IMMEDIATE")
        self.assertRegex(service.set("moshez", "x"), "^ERROR")
        self.assertEqual(service.get("/").headers["fingerd-problem"], "state file, users file")
        db.execute("ROLLBACK")
        put(service.users, USERS)
        service.signal(signal.SIGHUP)
        self.assertEqual(service.set("moshez", "x"), "OK\r\n")
        until(lambda: "fingerd-problem" not in service.get("/").headers)

    def test_bad_lines_are_logged_once_per_content(self) -> None:
        for text, logged in (
            ("moshez: new\n\noops\na@b: c\n", {r"users:3: \w+": 1, r"users:4: \w+": 1}),
            ("moshez: new\noops\n", {"users:2: ": 1, "users:3: ": 1}),
            ("oops\n" * 1000, {"users:100: ": 1, "users:101: ": 0, "and more": 1}),
        ):
            put(self.path, text)
            for _ in range(3):
                self.reloader.look()
                self.reload()
            self.assertEqual({pattern: self.count(pattern) for pattern in logged}, logged)

    def test_a_storm_of_sighups_starts_no_thread(self) -> None:
        service = self.launch("".join(f"u{n}: x\n" for n in range(20_000)))
        before, most = service.threads(), 0
        for _ in range(100):
            for _ in range(10):
                service.signal(signal.SIGHUP)
            most = max(most, service.threads())
        self.assertLessEqual(most, before)
        put(service.users, "moshez: after the storm\n", age=0.0)
        service.signal(signal.SIGHUP)
        until(lambda: service.finger("moshez") == "after the storm\r\n")

    def test_the_thread_survives_anything(self) -> None:
        self.begin(self.path, 0.01)
        put(self.path, "moshez: new\n")
        with mock.patch.object(self.source, "read", side_effect=MemoryError):
            self.reloader.look()
        self.assertEqual(self.count("MemoryError"), 1)
        with mock.patch.object(self.source, "read", side_effect=RuntimeError("gremlins")):
            self.reloader.start()
            until(lambda: self.count("gremlins"))
        until(lambda: self.text() == "new")
        self.assertEqual(self.count("gremlins"), 1)
        self.assertTrue(self.reloader.daemon)
        self.reloader.cancel()
        self.reloader.join(DEADLINE)
        self.assertFalse(self.reloader.is_alive())


# ================================================================================================
# 6. faces: finger, setter, web and XML-RPC over real sockets
# ================================================================================================

ODD = "a/b ?#%&<\"'>\u00e9"
MANY = f"{USERS}zo\u00e9: caf\u00e9 \u2615 <&>\nJohn Doe: out\nmute:\n{ODD}: <script>&\"'\n"


class Broken(fingerd.StatusStore):
    """A store with a fault inside."""

    def set(self, *_: Any) -> Any:
        raise RuntimeError("secret plan")

    now: Any = property(set, lambda *_: None)


class SharedCase(Case):
    """Tests that share a running fingerd."""

    options: ClassVar[tuple[str, ...]] = ("--hostname", "finger.example")
    service: ClassVar[Service]

    @classmethod
    def setUpClass(cls) -> None:
        cls.service = Service(MANY, *cls.options)
        cls.addClassCleanup(cls.service.close)

    def get(self, *target: str, **more: Any) -> Response:
        """The web server's response, as of `fetch`."""
        return self.service.get(*target, **more)

    def rpc(self, path: str = "/RPC2", port: int = 0) -> Any:
        """A stock XML-RPC client."""
        url = f"http://127.0.0.1:{port or self.service.port('web')}{path}"
        proxy = xmlrpc.client.ServerProxy(url)
        self.addCleanup(proxy("close"))
        return proxy

    def fault(self, function: Callable[..., Any], *arguments: Any) -> tuple[int, str]:
        """The code and the words of the fault that a call ends in."""
        with self.assertRaises(xmlrpc.client.Fault) as caught:
            function(*arguments)
        words = caught.exception.faultString
        self.assertNotRegex(words, r"Error\b|Exception|Traceback|<|_|\.py|'")
        return caught.exception.faultCode, words


class FingerTest(SharedCase):
    def test_a_list_that_is_remembered_answers_each_query_whole(self) -> None:
        for store in (fingerd.StatusStore(), make_store()):
            server = self.server(fingerd.FingerServer, store)
            sock = self.keep(connect(server.port))
            for query in (b"\n", b"\r\n", b"\n", b"  \r\nmore"):
                reply = server.reply(query, False, mock.Mock(sock=sock))
                self.assertEqual((reply.used, reply.close), (len(query), True))

    def test_who_types_slowly_is_waited_for(self) -> None:
        rows = [
            ("finger", b"moshez", HAPPY),
            ("setter", b"nobody\nback", b"OK\r\n"),
            ("web", b"GET /moshez?format=text HTTP/1.0\r\n", b"Happy and well\n"),
        ]

        def slow(number: int) -> None:
            face, query, answer = rows[number]
            with connect(self.service.port(face)) as sock:
                for part in (query[:3], query[3:]):
                    sock.sendall(part)
                    self.assertEqual(select.select([sock], [], [], 1.2)[0], [], "closed too early")
                sock.sendall(b"\r\n")
                self.assertTrue(read_all(sock).endswith(answer), face)

        in_parallel(len(rows), slow)

    def test_answers(self) -> None:
        nobody = b"No such user\r\n"
        denied = b"Finger forwarding service denied\r\n"
        lines = [line + "\r\n" for line in MANY.splitlines() if line != "mute:"]
        everybody = "".join(sorted(lines)).encode()
        rows = [
            *[(b"moshez" + end, HAPPY) for end in (b"\r\n", b"\n", b"\r\nmore\r\n")],
            (b" \t moshez \r\n", HAPPY),
            (b"\xff\xfd\x01\xff\xfb\x1fmoshez\r\n", HAPPY),
            (b"zo\xc3\xa9\r\n", "caf\u00e9 \u2615 <&>\r\n".encode()),
            (b"John Doe\r\n", b"out\r\n"),
            (b"nobody\r\n", nobody),
            (b"mute\r\n", nobody),
            (b"/W nobody\r\n", nobody),
            (b"MOSHEZ\r\n", HAPPY),
            ("ZOE\u0301\r\n".encode(), "caf\u00e9 \u2615 <&>\r\n".encode()),
            (b"john doe@localhost\r\n", b"out\r\n"),
            (b"\r\n", everybody),
            (b"\n", everybody),
            (b"@localhost\r\n", everybody),
            *[
                (f"moshez@{host}\r\n".encode(), HAPPY)
                for host in (
                    "localhost",
                    "LocalHost.",
                    "127.0.0.1",
                    "finger.example",
                    socket.gethostname(),
                )
            ],
            *[
                (f"moshez@{host}\r\n".encode(), denied)
                for host in ("elsewhere.example", "127.0.0.2", "localhost@elsewhere.example")
            ],
            (b"@elsewhere.example\r\n", denied),
            (b"x" * 513 + b"\r\n", b"Query too long\r\n"),
            (b"x" * 50_000, b"Query too long\r\n"),
        ]
        port = self.service.port("finger")
        for query, answer in rows:
            with self.subTest(query[:60]):
                self.assertEqual(ask(port, query), answer)
                self.assertEqual(ask(port, query, half_close=False), answer)
                if len(query) < 100 and not query.endswith(b"more\r\n"):
                    self.assertEqual(piecemeal(port, query), answer)
        for query, answer in ((b"", everybody), (b"moshez", HAPPY), (b"moshez\r", HAPPY)):
            with self.subTest(query):
                self.assertEqual(ask(port, query), answer)

    def test_the_longer_answer(self) -> None:
        wanted = r"Login: moshez\r\nStatus: Happy and well\r\n"
        wanted += r"Since: 20\d\d-\d\d-\d\d \d\d:\d\d UTC\r\n"
        for query in ("/W moshez", "/w Moshez", "moshez /W", "moshez /w", "/W moshez@localhost"):
            self.assertRegex(self.service.finger(query), rf"\A{wanted}\Z", query)
        lines = self.service.finger("/W").split("\r\n")
        plain = self.service.finger("").split("\r\n")
        self.assertEqual(len(lines), len(plain))
        for line, short in zip(lines[:-1], plain):
            self.assertTrue(line.startswith(short), line)
            self.assertRegex(line, r"20\d\d-\d\d-\d\d \d\d:\d\d UTC")

    def test_a_list_is_made_once_whoever_is_named_as_its_host(self) -> None:
        server = self.server(fingerd.FingerServer, make_store())
        with mock.patch.object(fingerd, "finger_answer", wraps=fingerd.finger_answer) as made:
            for query in (b"\r\n", b"@localhost\r\n", b"@127.0.0.1\r\n"):
                self.assertIn(b"moshez: ", ask(server.port, query))
            self.assertEqual(made.call_count, 1)

    def test_a_long_listing_says_how_many_are_left_out(self) -> None:
        store = make_store({f"user{number:04}": "\u2615" * 40 for number in range(3000)})
        server = self.server(fingerd.FingerServer, store)
        for query in (b"\n", b"/W\n"):
            answer = ask(server.port, query)
            lines = answer.decode().split("\r\n")
            self.assertEqual((len(lines), lines[1000:]), (1002, ["... and 2000 more", ""]))
        store = make_store({f"user{number:04}": "x" * 1_000 for number in range(300)})
        answer = ask(self.server(fingerd.FingerServer, store).port, b"\n").decode()
        self.assertTrue(99_000 < len(answer) < 100_100, len(answer))
        self.assertTrue(answer.endswith("... and 202 more\r\n"), answer[-30:])

    def test_a_fault_inside_leaks_nothing(self) -> None:
        logged = self.watch_log()
        server = self.server(fingerd.FingerServer, Broken())
        for query in (b"moshez\n", b"\n", b"/W\n"):
            self.assertEqual(ask(server.port, query), b"Internal error in server\r\n")
        self.assertEqual(sum("secret plan" in line for line in logged), 3)

    def test_an_unfinished_query_ends_with_its_time(self) -> None:
        server = self.server(
            fingerd.FingerServer, make_store(), fingerd.Policy(), None, seconds=0.2
        )
        self.assertEqual(ask(server.port, b"mosh", half_close=False), b"")


# ---- setter ------------------------------------------------------------------------------------


class SetterTest(SharedCase):
    options = ("-v", "--interval", "3600")

    def tearDown(self) -> None:
        for user in ("moshez", "shawn", "guest"):
            self.service.set(user, "")

    def test_a_message_shows_on_every_face_at_once(self) -> None:
        rows = [
            (b"moshez\nGiving a tutorial now, sorry!\n", "Giving a tutorial now, sorry!"),
            (b" moshez\r\n two\twords \r\n", "two words"),
            (b"moshez\nlast\nshawn\nignored\n", "last"),
            ("moshez\n<b> & \u2615\n".encode(), "<b> & \u2615"),
            (b"moshez\n\n", "Happy and well"),
        ]
        port = self.service.port("setter")
        for send in (
            lambda data: ask(port, data),
            lambda data: ask(port, data, half_close=False),
            lambda data: piecemeal(port, data),
        ):
            for data, text in rows:
                with self.subTest(data):
                    self.assertEqual(send(data), b"OK\r\n")
                    self.assertEqual(self.service.finger("moshez"), text + "\r\n")
                    self.assertEqual(self.rpc().getUser("moshez"), text)
                    self.assertEqual(self.get("/moshez?format=text").body.decode(), text + "\n")
                    self.assertIn(f"<p>{html.escape(text)}</p>", self.get().body.decode())
        self.assertEqual(self.service.finger("shawn"), "alive\r\n")

    def test_another_spelling_sets_the_same_users_message(self) -> None:
        everybody = len(self.service.finger("").splitlines())
        self.addCleanup(self.service.set, "zo\u00e9", "")
        for name, user in (("Moshez", "moshez"), ("ZOE\u0301", "zo\u00e9"), ("SHAWN", "shawn")):
            self.assertEqual(self.service.set(name, "mine"), "OK\r\n")
            self.assertEqual(self.service.finger(user), "mine\r\n")
        self.assertEqual(len(self.service.finger("").splitlines()), everybody)
        self.service.set("Guest", "here")
        self.service.set("GUEST", "still here")
        self.assertIn("\r\nGuest: still here\r\n", "\r\n" + self.service.finger(""))
        self.service.set("guest", "")
        self.assertEqual(self.service.finger("Guest"), "No such user\r\n")

    def test_a_message_with_an_end_says_so_everywhere(self) -> None:
        before = int(time.time()) // 60
        answer = self.service.set("moshez: 2h", "Out for lunch")
        ends = [fingerd.plain_time(60.0 * minute) for minute in range(before + 120, before + 123)]
        self.assertIn(answer, [f"OK until {end}\r\n" for end in ends])
        end = answer[len("OK until ") : -len("\r\n")]
        self.assertRegex(self.service.finger("/W moshez"), f"Since: .*\r\nUntil: {end}\r\n$")
        self.assertEqual(self.service.finger("moshez"), "Out for lunch\r\n")
        found = json.loads(self.get("/moshez?format=json").body)["until"]
        self.assertEqual(found[:16].replace("T", " ") + " UTC", end)
        self.assertIn(f">{end}</time>", self.get().body.decode())
        status = self.rpc().getStatus("moshez")
        self.assertEqual((status["user"], status["status"]), ("moshez", "Out for lunch"))
        self.assertEqual(set(status), {"user", "status", "since", "until"})
        until = time.strptime(status["until"].value, "%Y%m%dT%H:%M:%S")
        self.assertEqual(time.strftime("%Y-%m-%d %H:%M UTC", until), end)
        self.assertEqual(self.service.set("moshez: 2h", ""), "OK\r\n")
        self.assertNotIn("Until", self.service.finger("/W moshez"))
        self.assertEqual(set(self.rpc().getStatus("moshez")), {"user", "status", "since"})
        self.assertEqual(self.fault(self.rpc().getStatus, "nobody")[1], "No such user")

    def test_an_end_that_is_no_time_changes_nothing(self) -> None:
        for words, problem in (
            ("moshez:", "no such time"),
            ("moshez: soon", "no such time"),
            ("moshez: 2000-01-01", "the time has passed"),
            ("moshez: 99w", "over a year away"),
        ):
            answer = self.service.set(words, "hi")
            self.assertRegex(answer, rf"\AERROR {problem}: write 30m, [^\r\n]+\r\n\Z")
            self.assertEqual(self.service.finger("moshez"), "Happy and well\r\n")

    def test_each_set_is_logged_with_the_account(self) -> None:
        until_time = (time.time() + 7200) // 60 * 60
        end = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(until_time))
        local = time.strftime("%Y-%m-%d %H:%M", time.localtime(until_time))
        for data, line in [
            ("Moshez\nsecret plan\n", f"'moshez' set by {ACCOUNT}"),
            (f"moshez: {local}\nsecret plan\n", f"'moshez' set by {ACCOUNT} until {end}"),
            ("moshez\n\n", f"'moshez' taken back by {ACCOUNT}"),
            ("zo\u00e9\n\n", f"'zo\\xe9' taken back by {ACCOUNT}"),
        ]:
            ask(self.service.port("setter"), data.encode())
            self.service.wait_for(f" INFO setter: {re.escape(line)}$")
        texts = [line for line in self.service.log if "secret plan" in line]
        self.assertTrue(texts)
        self.assertTrue(all(" DEBUG " in line for line in texts))

    @unittest.skipUnless(hasattr(socket, "AF_NETLINK"), "the system tells no account")
    def test_the_owner_of_a_client_on_this_machine(self) -> None:
        uid = 1 if ROOT else os.geteuid()
        for host, listener in (
            ("127.0.0.1", socket.create_server(("127.0.0.1", 0))),
            ("::1", socket.create_server(("::1", 0), family=socket.AF_INET6)),
            ("127.0.0.1", fingerd.listen("finger", "0")),
            ("::ffff:127.0.0.1", socket.create_server(("127.0.0.1", 0))),
            ("::ffff:127.0.0.1", fingerd.listen("finger", "0")),
        ):
            with self.subTest(host), listener:
                os.seteuid(uid)
                client = self.keep(socket.create_connection((host, listener.getsockname()[1])))
                os.seteuid(0 if ROOT else uid)
                sock = self.keep(listener.accept()[0])

                def owner(sock: Any = sock) -> int | None:
                    return fingerd.find_owner(sock.getpeername(), sock.getsockname())

                self.assertEqual(owner(), uid)
                os.seteuid(uid)
                bound = self.keep(socket.socket(client.family))
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
                bound.connect(client.getpeername())
                os.seteuid(0 if ROOT else uid)
                self.assertEqual(owner(self.keep(listener.accept()[0])), uid)
                client.shutdown(socket.SHUT_WR)
                self.assertEqual(owner(), uid)
                with mock.patch("socket.socket", side_effect=PermissionError):
                    self.assertIsNone(owner())
                with mock.patch("socket.AF_NETLINK"):
                    del socket.AF_NETLINK
                    self.assertIsNone(owner())
                peer, own = sock.getpeername(), sock.getsockname()
                self.assertIsNone(fingerd.find_owner((peer[0], peer[1] ^ 1), own))
                self.assertIsNone(fingerd.find_owner(peer, (own[0], own[1] ^ 1)))
                other = "::2" if ":" in fingerd.plain_address(peer) else "127.0.0.2"
                self.assertIsNone(fingerd.find_owner((other, peer[1]), own))
                client.close()  # the socket stays, but belongs to root
                self.assertIsNone(owner())

    def test_an_owner_without_a_name_is_called_by_the_uid(self) -> None:
        self.assertEqual(fingerd.account_name(os.geteuid()), pwd.getpwuid(os.geteuid()).pw_name)
        with mock.patch("pwd.getpwuid", side_effect=KeyError):
            self.assertEqual(fingerd.account_name(54_321), "uid 54321")

    def test_a_listener_is_not_taken_for_a_client_from_elsewhere(self) -> None:
        for listener, client, server in (
            (socket.create_server(("", 0)), "192.0.2.7", "192.0.2.1"),
            (fingerd.listen("finger", "0"), "::ffff:192.0.2.7", "::ffff:192.0.2.1"),
            (fingerd.listen("finger", "0"), "2001:db8::1", "2001:db8::2"),
        ):
            with self.subTest(client), listener:
                port = listener.getsockname()[1]
                self.assertIsNone(fingerd.find_owner((client, port), (server, 1079)))

    def test_a_half_close_ends_the_second_line(self) -> None:
        self.assertEqual(ask(self.service.port("setter"), b"guest\nhello"), b"OK\r\n")
        self.assertEqual(self.service.finger("guest"), "hello\r\n")
        self.assertIn("guest: hello\r\n", self.service.finger(""))

    def test_what_cannot_be_honoured_changes_nothing(self) -> None:
        self.service.set("moshez", "before")
        everybody = self.service.finger("")
        rows = [
            b"",
            b"\n",
            b"moshez",
            b"moshez\n",
            b"moshez\r\n",
            b"\nhi\n",
            b"a:b\nhi\n",
            b"#\nhi\n",
            b"x" * 65 + b"\nhi\n",
            b"\xe9\nhi\n",
            b"moshez\n" + b"x" * 1001 + b"\n",
            b"x" * 9000,
            post(b"moshez\nhi\n", target="/moshez"),
            b"moshez\n" + b"x" * 50_000,
        ]
        for data in rows:
            with self.subTest(data[:60]):
                answer = ask(self.service.port("setter"), data)
                self.assertRegex(answer, rb"\AERROR [a-zA-Z0-9 ',:/#@.-]+\r\n\Z")
        self.assertEqual(self.service.finger(""), everybody)

    def test_a_reset_sets_nothing(self) -> None:
        reset(connect(self.service.port("setter"), b"moshez\nnot done"))
        self.service.wait_for("setter: .*reset")
        self.assertEqual(self.service.finger("moshez"), "Happy and well\r\n")

    def test_nothing_is_set_when_the_time_is_up(self) -> None:
        store = make_store({})
        server = self.server(fingerd.SetterServer, store, seconds=0.2)
        self.assertEqual(ask(server.port, b"moshez\nnot done", half_close=False), b"")
        self.assertEqual(texts_of(store), {})

    def test_a_fault_inside_leaks_nothing(self) -> None:
        logged = self.watch_log()
        server = self.server(fingerd.SetterServer, Broken())
        self.assertEqual(ask(server.port, b"a\nb\n"), b"ERROR Internal error in server\r\n")
        self.assertEqual(sum("secret plan" in line for line in logged), 1)

    def test_the_file_is_looked_at_before_a_message_is_set(self) -> None:
        self.addCleanup(self.reload, MANY)
        put(self.service.users, "moshez: edited\n")
        self.assertEqual(self.service.set("moshez", "mine"), "OK\r\n")
        self.assertEqual(self.service.finger("shawn"), "No such user\r\n")
        self.service.signal(signal.SIGHUP)
        self.assertEqual(self.service.finger("moshez"), "mine\r\n")
        self.reload("moshez: later\n")
        self.assertEqual(self.service.finger("moshez"), "later\r\n")

    def reload(self, text: str) -> None:
        """Let the file say `text`, and wait until that is seen."""
        mark = str(time.monotonic_ns())
        put(self.service.users, f"{text}reloaded: {mark}\n")
        self.service.signal(signal.SIGHUP)
        until(lambda: self.service.finger("reloaded") == mark + "\r\n")

    def test_sighup_reads_the_file_at_once(self) -> None:
        self.addCleanup(self.reload, MANY)
        self.service.set("shawn", "kept")
        self.reload("moshez: now\nshawn: alive\n")
        self.assertEqual(self.service.finger("moshez"), "now\r\n")
        self.assertEqual(self.service.finger("shawn"), "kept\r\n")


# ---- web ---------------------------------------------------------------------------------------


class Links(html.parser.HTMLParser):
    """The links of a page; fails on tags that do not match."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.hrefs: list[str] = []
        self.times: list[str] = []
        self._open: list[str] = []
        self.feed(page.decode())
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        if tag not in ("meta", "link"):
            self._open.append(tag)
        if tag == "a":
            self.hrefs.append(dict(attributes)["href"])
        elif tag == "time":
            self.times.append(dict(attributes)["datetime"])

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, tag


ISO = r"\A20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ\Z"


class WebTest(SharedCase):
    def test_a_users_page(self) -> None:
        for path, text in (
            ("moshez", "Happy and well"),
            ("zo%C3%A9", "caf\u00e9 \u2615 <&>"),
            ("zo\u00e9", "caf\u00e9 \u2615 <&>"),
            ("John%20Doe", "out"),
            ("a%2Fb%20%3F%23%25%26%3C%22%27%3E%C3%A9", "<script>&\"'"),
        ):
            with self.subTest(path):
                page = self.get("/" + path)
                user = html.escape(urllib.parse.unquote(path))
                wanted = f"<h1>{user}</h1><p>{html.escape(text)}</p>"
                self.assertEqual(page.status, 200)
                self.assertIn(wanted, page.body.decode())
                (since,) = Links(page.body).times
                self.assertRegex(since, ISO)
                self.assertTrue(page.body.startswith(b"<!DOCTYPE html>"))
        headers = self.get("/moshez", "Origin: http://elsewhere").headers
        self.assertNotIn("access-control-allow-origin", headers)
        self.assertEqual(headers["content-type"], "text/html; charset=utf-8")
        self.assertEqual(headers["cache-control"], "no-cache")
        self.assertEqual(headers["x-content-type-options"], "nosniff")
        self.assertIn("default-src 'none'", headers["content-security-policy"])
        self.assertRegex(headers["date"], r"\A\w{3}, \d\d \w{3} 20\d\d \d\d:\d\d:\d\d GMT\Z")
        self.assertEqual(headers["vary"], "Accept")

    def test_an_unknown_users_page_escapes_the_name(self) -> None:
        for path, user in (
            ("nobody", "nobody"),
            ("mute", "mute"),
            ("a%0d%0aX-Evil:1", "aX-Evil:1"),
            ("%3Cb%3E%22", "&lt;b&gt;&quot;"),
        ):
            page = self.get("/" + path)
            self.assertEqual(page.status, 404)
            self.assertIn(f"<h1>{user}</h1><p>No such user</p>", page.body.decode())
            self.assertEqual(Links(page.body).hrefs, ["/"])
            self.assertNotIn("x-evil", page.headers)

    def test_a_users_page_has_the_spelling_of_the_file(self) -> None:
        for path, user in (
            ("MOSHEZ", "moshez"),
            ("zoe%cc%81", "zo\u00e9"),
            ("JOHN%20DOE", "John Doe"),
        ):
            page = self.get(f"/{path}?format=json")
            self.assertEqual((page.status, json.loads(page.body)["user"]), (200, user))
            self.assertIn(f"<h1>{user}</h1>", self.get(f"/{path}").body.decode())

    def test_the_list_links_to_everybody(self) -> None:
        page = self.get("/")
        self.assertEqual(page.status, 200)
        self.assertIn("usage: site/user", page.body.decode())
        links = Links(page.body)
        self.assertEqual(len(links.times), 5)
        found = set()
        for href in links.hrefs:
            self.assertTrue(href.startswith("/"), href)
            linked = self.get(href)
            self.assertEqual(linked.status, 200, href)
            found.update(re.findall("<h1>(.*)</h1>", linked.body.decode()))
        users = {"moshez", "shawn", "zo\u00e9", "John Doe", html.escape(ODD)}
        self.assertEqual(found & users, users)
        self.assertNotIn("mute", page.body.decode())
        self.assertIn("<footer>", self.get().body.decode())

    def test_the_newest_status_stands_first(self) -> None:
        store = make_store({"b": "one", "a": "two", "c": "three"})
        store.set("b", "new")
        policy = fingerd.Policy(finger_host="<host>", public_url="http://h/s/")
        port = self.server(fingerd.WebServer, store, policy).port
        page = fetch(port, "/")
        links = [f"http://h/s/{rest}" for rest in ("?format=atom", *"bac")]
        self.assertEqual(Links(page.body).hrefs, links)
        self.assertIn("<h1>Statuses at &lt;host&gt;</h1>", page.body.decode())

    def test_an_empty_list_says_how_to_set_the_first_status(self) -> None:
        page = fetch(self.server(fingerd.WebServer, make_store({})).port, "/")
        self.assertIn(
            "yet: write <code>user: status</code> into the users file", page.body.decode()
        )
        self.assertNotIn("Nobody has a status", self.get("/").body.decode())

    def test_remembered_pages_are_as_short_as_promised(self) -> None:
        for text in ("http://" + "&" * 993, '"' * 1_000, "http://" + "\U0001f468" * 993):
            name = "\U0001f468" * 64
            port = self.server(
                fingerd.WebServer, make_store({name: text}), fingerd.Policy(), None
            ).port
            page = fetch(port, "/" + urllib.parse.quote(name))
            self.assertEqual(page.status, 200)
            self.assertLess(len(page.body), 20_000)

    def test_the_pages_need_no_script_and_ask_for_nothing(self) -> None:
        for target in ("/", "/moshez", "/nobody"):
            page = self.get(target).body.decode()
            for part in (
                'rel="icon" href="data:,"',
                'name="viewport"',
                "color-scheme: light dark",
                "<title>",
                'lang="en"',
            ):
                self.assertIn(part, page, target)
            self.assertNotRegex(page, r"<script|<img|src=|javascript:|https?://|http-equiv")

    def test_a_connection_is_kept_or_closed(self) -> None:
        close, keep = "Connection: close", "Connection: keep-alive"
        rows: list[tuple[int, bool, bytes]] = [  # status, whether the connection stays, request
            (200, True, request()),
            (404, True, request("/nobody")),
            (200, True, post(CALL, target="/")),
            (200, True, post(CALL)),
            (405, True, post(CALL, target="/moshez")),
            (405, True, request(method="PUT", body=b"x" * 65536)),
            (400, False, request("*", method="OPTIONS")),
            (405, True, request(method="BREW")),
            (405, True, request(method="get")),
            (406, True, request("/", "Accept: image/png")),
            (200, True, request(body=b"GET /smuggled HTTP/1.1\r\n\r\n")),
            (200, True, request("http://elsewhere/moshez")),
            (200, True, b"\r\n\r\n" + request()),
            (200, False, request("/moshez", close)),
            (200, False, request("/moshez", "Connection: TE, Close")),
            (200, False, request(version="1.0")),
            (200, True, request("/moshez", keep, version="1.0")),
            (400, False, b"GET /moshez\r\n\r\n"),
            (400, False, b"GET / HTTP/1.1\r\n\r\n"),
            (400, False, request("/moshez", "Host: h")),
            (400, False, request("/moshez", "X : y")),
            (400, False, request("/moshez", "Content-Length: +5")),
            (400, False, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n\n"),
            (400, False, request(version="2.0")),
            (200, True, post(b"", "Transfer-Encoding: chunked") + chunked(CALL, 7)),
            (200, True, request("/moshez", "Transfer-Encoding: chunked") + b"0\r\n\r\n"),
            (
                405,
                True,
                request("/moshez", "Transfer-Encoding: chunked", method="PUT")
                + chunked(b"x" * 999, 99),
            ),
            (400, False, post(b"x", "Transfer-Encoding: chunked") + b"0\r\n\r\n"),
            (400, False, post(b"", "Transfer-Encoding: chunked") + b"5\n"),
            (413, False, post(b"", "Transfer-Encoding: chunked") + chunked(b"x" * 65_537, 9_999)),
            (501, False, post(b"", "Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n"),
            (413, False, post(b"", "Content-Length: 65537") + b"x" * 99),
            (431, False, request("/" + "x" * 20_000)),
            (431, False, request("/", "X: " + "x" * 20_000)),
            (200, True, post(CALL, "Expect: miracles")),
        ]
        for status, kept, data in rows:
            with self.subTest(data[:80]):
                probe = request("/shawn?format=text", close)
                answer = ask(self.service.port("web"), data + probe)
                first, *others = responses(answer)
                self.assertEqual(first.status, status)
                bodies = [(other.status, other.body) for other in others]
                self.assertEqual(bodies, [(200, b"alive\n")] if kept else [])
                if not kept and b"HTTP/1.0" not in data:
                    self.assertEqual(first.headers.get("connection"), "close")
                if b"keep-alive" in data:
                    self.assertEqual(first.headers.get("connection"), "keep-alive")
                self.assertEqual("allow" in first.headers, status == 405)
                self.assertNotRegex(first.body, rb"xxxx|BREW|image/png|smuggled")

    def test_pipelined_and_piecemeal_requests(self) -> None:
        data = b"".join(map(request, ("/moshez?format=text", "/shawn?format=text") * 20))
        bodies = [one.body for one in responses(ask(self.service.port("web"), data))]
        self.assertEqual(bodies, [b"Happy and well\n", b"alive\n"] * 20)
        (answer,) = responses(piecemeal(self.service.port("web"), request("/shawn?format=text")))
        self.assertEqual(answer.body, b"alive\n")
        call = post(b"", "Transfer-Encoding: chunked") + chunked(CALL, 9)
        (answer,) = responses(piecemeal(self.service.port("web"), call))
        self.assertIn(b"Happy and well", answer.body)

    def test_a_stock_client_reuses_its_connection(self) -> None:
        client = http.client.HTTPConnection("127.0.0.1", self.service.port("web"), DEADLINE)
        with contextlib.closing(client):
            for method, target, body in (
                ("GET", "/moshez", None),
                ("HEAD", "/", None),
                ("GET", "/nobody", None),
                ("PUT", "/moshez", "x" * 9),
                ("GET", "/?format=json", None),
            ) * 2:
                client.request(method, target, body)
                sock = client.sock
                client.getresponse().read()
                self.assertIs(client.sock, sock)

    def test_head_is_get_without_the_body(self) -> None:
        for target in ("/", "/moshez", "/nobody", "/?format=json", "/?format=xml"):
            got, head = self.get(target), self.get(target, method="HEAD")
            for response in (got, head):
                response.headers.pop("date")
                response.headers.pop("last-modified", None)  # comes a second after the change
            self.assertEqual((head.status, head.headers), (got.status, got.headers), target)
            self.assertEqual(int(head.headers["content-length"]), len(got.body))

    def test_a_body_that_cannot_come_is_not_asked_for(self) -> None:
        head = post(b"", "Expect: 100-continue").replace(b"Length: 0", b"Length: 5")
        for data in (head, head + b"abc"):
            self.assertEqual(ask(self.service.port("web"), data).count(b"100 Continue"), 0)

    def test_a_body_is_asked_for(self) -> None:
        expect, coding = "Expect: 100-continue", "Transfer-Encoding: chunked"
        for data in (post(CALL, expect), post(b"", expect, coding) + chunked(CALL, 99)):
            top, _, body = data.partition(b"\r\n\r\n")
            with connect(self.service.port("web"), top + b"\r\n\r\n") as sock:
                self.assertEqual(sock.recv(100), b"HTTP/1.1 100 Continue\r\n\r\n")
                sock.sendall(body)
                sock.shutdown(socket.SHUT_WR)
                (answer,) = responses(read_all(sock))
            self.assertIn(b"Happy and well", answer.body)

    def test_a_body_is_not_asked_for_if_the_request_is_refused(self) -> None:
        rows = [
            (405, post(CALL, target="/moshez")),
            (405, request(method="PUT", body=b"x")),
            (413, post(b"", "Content-Length: 65537")),
            (405, request(method="BREW", body=b"x")),
        ]
        for status, data in rows:
            top = data.partition(b"\r\n\r\n")[0] + b"\r\nExpect: 100-continue\r\n\r\n"
            with self.subTest(status), connect(self.service.port("web"), top) as sock:
                (answer,) = responses(read_all(sock))
                self.assertEqual((answer.status, answer.headers["connection"]), (status, "close"))

    def test_the_methods_that_can_be_used_are_named(self) -> None:
        store = make_store({"RPC2": "a user"})
        other = self.server(fingerd.WebServer, store).port
        rows = [
            (self.service.port("web"), 405, "PUT", "/", "GET, HEAD, POST"),
            (self.service.port("web"), 405, "POST", "/moshez", "GET, HEAD"),
            (self.service.port("web"), 405, "GET", "/RPC2", "POST"),
            (self.service.port("web"), 405, "HEAD", "/RPC2?format=json", "POST"),
            (self.service.port("web"), 405, "OPTIONS", "/", "GET, HEAD, POST"),
            (other, 405, "PUT", "/RPC2", "GET, HEAD, POST"),
            (other, 200, "GET", "/RPC2", None),
        ]
        for port, status, method, target, allowed in rows:
            with self.subTest(method, target=target):
                answer = fetch(port, target, method=method)
                self.assertEqual((answer.status, answer.headers.get("allow")), (status, allowed))

    def test_what_is_known_is_not_sent_again(self) -> None:
        for target in ("/", "/moshez", *(f"/moshez?format={name}" for name in fingerd.FORMATS)):
            dated = until(lambda t=target: "last-modified" in self.get(t).headers and self.get(t))
            etag, modified = dated.headers["etag"], dated.headers["last-modified"]
            for condition in (
                f"If-None-Match: {etag}",
                f'If-None-Match: "x", W/{etag}',
                "If-None-Match: *",
                f"If-Modified-Since: {modified}",
            ):
                for method in ("GET", "HEAD"):
                    known = self.get(target, condition, method=method)
                    self.assertEqual((known.status, known.body), (304, b""), condition)
                    self.assertEqual(known.headers["etag"], etag)
            for condition in (
                'If-None-Match: "x"',
                "If-Modified-Since: yesterday",
                f'If-None-Match: "x"\r\nIf-Modified-Since: {modified}',
            ):
                self.assertEqual(self.get(target, condition).body, dated.body, condition)

    def test_a_page_that_is_not_wanted_any_more_is_not_sent(self) -> None:
        page = until(lambda: "last-modified" in self.get().headers and self.get())
        etag, modified = page.headers["etag"], page.headers["last-modified"]
        rows = [
            (200, f"If-Match: {etag}"),
            (200, f'If-Match: "x", {etag}'),
            (200, "If-Match: *"),
            (200, f"If-Unmodified-Since: {modified}"),
            (200, "If-Unmodified-Since: Thu, 01 Jan 2099 00:00:00 GMT"),
            (200, "If-Unmodified-Since: yesterday"),
            (200, f"If-Match: {etag}\r\nIf-Unmodified-Since: Thu, 01 Jan 1970 00:00:00 GMT"),
            (304, f"If-Match: {etag}\r\nIf-None-Match: {etag}"),
            (412, 'If-Match: "x"'),
            (412, f"If-Match: W/{etag}"),
            (412, "If-Unmodified-Since: Thu, 01 Jan 1970 00:00:00 GMT"),
            (412, f'If-Match: "x"\r\nIf-None-Match: {etag}'),
        ]
        for status, condition in rows:
            for method in ("GET", "HEAD"):
                with self.subTest(condition):
                    self.assertEqual(self.get("/moshez", condition, method=method).status, status)
        self.assertEqual(self.get("/nobody", "If-Match: *").status, 404)

    def test_the_style_is_the_one_that_the_policy_allows(self) -> None:
        style = re.findall("<style>(.*?)</style>", self.get().body.decode(), re.DOTALL)[0]
        digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        self.assertIn(f"'sha256-{digest}'", self.get().headers["content-security-policy"])

    def test_two_processes_agree_on_etags_and_ids(self) -> None:
        pages = []
        for service in (self.service, self.launch(MANY, *self.options)):
            os.utime(service.users, (1_000_000_000, 1_000_000_000))
            service.stop()
            service.start()
            feed = service.get("/?format=atom").body.decode()
            etag = service.get("/?format=text").headers["etag"]
            pages.append((etag, re.findall("<id>(.*?)</id>", feed)))
        self.assertEqual(*pages)

    def test_each_format_has_its_own_etag(self) -> None:
        for path in ("/", "/moshez"):
            pages = [self.get(f"{path}?format={name}") for name in fingerd.FORMATS]
            self.assertEqual([page.status for page in pages], [200] * 4)
            self.assertEqual([page.headers["vary"] for page in pages], ["Accept"] * 4)
            self.assertEqual(len({page.headers["etag"] for page in pages}), 4)
            types = [page.headers["content-type"].split(";")[0] for page in pages]
            self.assertEqual(types, [ranges[0] for ranges in fingerd.FORMATS.values()])
            for media_type, page in zip(types, pages):
                self.assertEqual(self.get(path, f"Accept: {media_type}").body, page.body)

    def test_text(self) -> None:
        self.assertEqual(self.get("/moshez?format=text").body, b"Happy and well\n")
        self.assertEqual(self.get("/nobody?format=text").status, 404)
        users = parse_users(self.get("/?format=text").body)
        wanted = parse_users(MANY.encode()).texts
        del wanted["mute"]
        self.assertEqual((users.texts, users.problems), (wanted, []))
        self.assertEqual(list(users.texts), sorted(wanted))

    def test_json(self) -> None:
        one = json.loads(self.get("/moshez?format=json").body)
        self.assertEqual((one["user"], one["status"]), ("moshez", "Happy and well"))
        self.assertEqual(set(one), {"user", "status", "since", "until"})
        self.assertRegex(one["since"], ISO)
        everybody = json.loads(self.get("/?format=json").body)
        self.assertEqual([item["user"] for item in everybody], sorted(i["user"] for i in everybody))
        self.assertIn(one, everybody)
        self.assertEqual(len(everybody), 5)
        missing = self.get("/nobody?format=json")
        self.assertEqual((missing.status, json.loads(missing.body)["user"]), (404, "nobody"))

    def feed(self, target: str) -> Any:
        """The feed as an element, without its namespace, checked for what RFC 4287 demands."""
        feed = xml.etree.ElementTree.fromstring(self.get(target).body)
        for element in feed.iter():
            space, _, element.tag = element.tag.rpartition("}")
            self.assertEqual(space, "{http://www.w3.org/2005/Atom")
        for part in [feed, *feed.findall("entry")]:
            self.assertRegex(part.findtext("updated"), ISO)
            self.assertRegex(part.findtext("id"), r"\A[a-z]+:")
            self.assertTrue(part.findtext("title"))
            self.assertTrue(part.findtext("author/name"))
            self.assertTrue(part.find("link").get("href").startswith("/"))
        return feed

    def test_atom(self) -> None:
        feed = self.feed("/?format=atom")
        entries = {e.findtext("author/name"): e.findtext("content") for e in feed.findall("entry")}
        self.assertEqual(len(entries), 5)
        self.assertEqual(entries[ODD], "<script>&\"'")
        updated = [entry.findtext("updated") for entry in feed.findall("entry")]
        self.assertEqual(updated, sorted(updated, reverse=True))
        self.assertEqual(feed.findtext("updated"), updated[0])
        (entry,) = self.feed("/moshez?format=atom").findall("entry")
        self.assertEqual(entry.findtext("content"), "Happy and well")
        ids = [item.findtext("id") for item in feed.findall("entry")]
        self.assertIn(entry.findtext("id"), ids)
        self.assertEqual(len({feed.findtext("id"), *ids}), 6)
        page = self.get().body.decode()
        self.assertRegex(page, r'<link rel="alternate" type="application/atom\+xml" href="[^"]+"')

    def test_a_feeds_ids_are_stable(self) -> None:
        def ids() -> dict[str, str]:
            entries = self.feed("/?format=atom").findall("entry")
            return {e.findtext("author/name"): e.findtext("id") for e in entries}

        before = ids()
        self.addCleanup(self.service.set, "shawn", "")
        self.service.set("shawn", "changed")
        changed = {user for user, name in ids().items() if name != before[user]}
        self.assertEqual(changed, {"shawn"})

    def test_a_list_that_is_remembered_does_not_take_long(self) -> None:
        store = make_store({f"user{number:05}": "hi" for number in range(101)})
        answers = fingerd.WebAnswers(store, fingerd.Policy())

        def takes_long(target: str = "/") -> bool:
            head = f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
            request: Any = fingerd.parse_http_request(head)
            long = answers.takes_long(request, store.now)
            answers.page(request, store.now)
            return long

        self.assertEqual([takes_long(), takes_long()], [True, False])
        self.assertEqual([takes_long("/?format=json"), takes_long()], [True, False])
        self.assertFalse(takes_long("/user00001"))
        store.set("user00001", "new")
        self.assertEqual([takes_long(), takes_long()], [True, False])

    def test_long_lists_end_with_how_many_are_left_out(self) -> None:
        store = make_store({f"user{number:05}": "hi" for number in range(10_001)})
        port = self.server(fingerd.WebServer, store).port
        page, text, listed, feed = (fetch(port, f"/?format={name}") for name in fingerd.FORMATS)
        self.assertEqual(len(self.rpc(port=port).listUsers()), 10_000)
        self.assertEqual(len(Links(page.body).times), 1000)
        self.assertIn("... and 9001 more", page.body.decode())
        self.assertEqual(text.body.count(b"\n"), 10_001)
        self.assertEqual(len(json.loads(listed.body)), 10_001)
        self.assertEqual(feed.body.count(b"<entry>"), 50)

    def test_a_fault_inside_leaks_nothing(self) -> None:
        logged = self.watch_log()
        port = self.server(fingerd.WebServer, Broken()).port
        page, answer = fetch(port), fetch(port, "/RPC2", method="POST", body=CALL)
        self.assertEqual((page.status, answer.status), (500, 500))
        self.assertNotRegex(page.body + answer.body, rb"secret|RuntimeError|Traceback")
        self.assertEqual(sum("secret plan" in line for line in logged), 2)

    def test_different_requests_do_not_fill_the_memory(self) -> None:
        users = "".join(f"user{number}: {'&' * 900}\n" for number in range(50))
        service = self.launch(users, "--public-url", "http://h/")
        padded = xmlrpc.client.dumps((), "listUsers").encode()
        kinds: list[Callable[[int], bytes]] = [
            lambda n: request(f"/{n}{'x' * 1_000}?format={[*fingerd.FORMATS, ''][n % 5]}"),
            lambda n: request(f"/user{n % 50}".replace("u", f"%75?{n}".partition("?")[0])),
            lambda n: request(f"/user{n % 50}?{n}{'x' * 1_000}&format=atom"),
            lambda n: request(f"/?{n}{'x' * 1_000}&format=text"),
            lambda n: request("/user1", f"Accept: text/plain, text/{n}{'x' * 1_000}"),
            lambda n: request("/user1", *[f"X-{n}-{m}: " for m in range(60)]),
            lambda n: request("/user1?format=atom").replace(b": h", f": {n}{'h' * 200}".encode()),
            lambda n: post(padded + f"{n:b}".translate({48: " ", 49: "\n"}).encode()),
            lambda n: post(call("getUser", f"{n}{'x' * 400}")),
            lambda n: post(call("system.multicall", [{"methodName": f"{n}", "params": []}])),
            lambda n: post(CALL.replace(b"?>", b" encoding='utf-%d'?>" % n)),
        ]

        def most(numbers: range) -> int:
            """The most memory that the service holds after these requests of a kind."""
            sizes = []
            for kind in kinds:
                for start in numbers[::50]:
                    ask(service.port("web"), b"".join(map(kind, range(start, start + 50))))
                sizes.append(service.resident())
            return max(sizes)

        before = most(range(50))
        self.assertLess(most(range(50, 5_050)) - before, 10_000_000)


class PrivateTest(SharedCase):
    options = ("--private", "--public-url", "https://www.example/s")

    def test_lists_are_refused(self) -> None:
        for query in ("", "/W", "@localhost"):
            self.assertEqual(self.service.finger(query), "Finger online user list denied\r\n")
        page = self.get("/")
        self.assertEqual(page.status, 200)
        self.assertIn(b"usage: site/user", page.body)
        self.assertIn(b"The list of users is private", page.body)
        self.assertNotIn(b"moshez", page.body)
        for name in ("text", "json", "atom"):
            page = self.get(f"/?format={name}")
            self.assertEqual(page.status, 403)
            self.assertRegex(page.body, b"private")
            self.assertNotIn(b"moshez", page.body)
        self.assertEqual(self.fault(self.rpc().listUsers)[1], "Finger online user list denied")

    def test_the_page_does_not_tell_that_a_message_was_set(self) -> None:
        def headers() -> dict[str, str]:
            return {**self.get("/").headers, "date": ""}

        before = headers()
        self.addCleanup(self.service.set, "shawn", "")
        self.assertEqual(self.service.set("shawn", "new"), "OK\r\n")
        self.assertEqual(headers(), before)
        self.assertNotIn("last-modified", before)

    def test_a_user_who_is_asked_for_by_name_is_told(self) -> None:
        self.assertEqual(self.service.finger("moshez"), "Happy and well\r\n")
        self.assertEqual(self.service.finger("nobody"), "No such user\r\n")
        self.assertEqual(self.rpc().getUser("moshez"), "Happy and well")
        for name in fingerd.FORMATS:
            self.assertEqual(self.get(f"/moshez?format={name}").status, 200)

    ORIGIN = "access-control-allow-origin"

    def test_pages_elsewhere_may_read_a_public_page(self) -> None:
        for target in ("/", "/moshez", "/moshez?format=json", "/nobody", "/moshez?format=atom"):
            page = self.get(target, "Origin: https://elsewhere.example")
            self.assertEqual(page.headers.get(self.ORIGIN), "*", target)
            known = self.get(target, f"If-None-Match: {page.headers['etag']}")
            self.assertEqual(known.headers.get(self.ORIGIN), "*", target)
            asked = self.get(target, "Access-Control-Request-Method: GET", method="OPTIONS")
            self.assertEqual((asked.status, asked.body), (204, b""))
            self.assertEqual(asked.headers.get(self.ORIGIN), "*")
            self.assertEqual(asked.headers["access-control-allow-methods"], "GET, HEAD")
            self.assertNotIn("content-length", asked.headers)

    def test_no_page_elsewhere_may_read_calls(self) -> None:
        for method in ("OPTIONS", "POST", "GET"):
            answer = self.get("/RPC2", method=method, body=CALL)
            self.assertNotIn(self.ORIGIN, answer.headers, method)
        self.assertNotIn(self.ORIGIN, self.get("/", method="POST", body=CALL).headers)

    def test_absolute_links_lead_to_the_public_url(self) -> None:
        feed = self.get("/moshez?format=atom")
        hrefs = re.findall(r'href="(.*?)"', feed.body.decode())
        self.assertTrue(hrefs)
        self.assertEqual([h for h in hrefs if not h.startswith("https://www.example/s/moshez")], [])
        page = self.get("/moshez").body.decode()
        self.assertIn("https://www.example/s/", page)
        self.assertIn("Statuses at www.example", self.get("/").body.decode())

    def test_a_page_says_how_to_finger_the_user(self) -> None:
        for user, command in (("moshez", "moshez@h"), ("John Doe", "&#x27;John Doe@h&#x27;")):
            for shows_command in (True, False):
                policy = fingerd.Policy(finger_host="h", shows_command=shows_command)
                page = fingerd.user_html(user, fingerd.Status("hi", 0.0), policy, "")
                self.assertEqual(f"<code>finger {command}</code>" in page, shows_command)


# ---- XML-RPC -----------------------------------------------------------------------------------


class XmlRpcTest(SharedCase):
    def test_a_stock_client(self) -> None:
        proxy = self.rpc()
        self.assertEqual(proxy.getUser("moshez"), "Happy and well")
        self.assertEqual(proxy.getUser("zo\u00e9"), "caf\u00e9 \u2615 <&>")
        self.assertIn(
            "<string>caf&#233; &#9749; &lt;", self.service.rpc(call("getUser", "zo\u00e9"))
        )
        self.assertEqual(proxy.getUser("nobody"), "No such user")
        self.assertEqual(proxy.getUser("mute"), "No such user")
        self.assertEqual(proxy.getUser("MOSHEZ"), "Happy and well")
        everybody = [line.split(": ") for line in MANY.splitlines() if line != "mute:"]
        self.assertEqual(proxy.listUsers(), dict(everybody))
        methods = [
            "getPlan",
            "getStatus",
            "getUser",
            "listUsers",
            *(
                f"system.{name}"
                for name in ("listMethods", "methodHelp", "methodSignature", "multicall")
            ),
        ]
        self.assertEqual(sorted(proxy.system.listMethods()), methods)
        for method in methods:
            self.assertGreater(len(proxy.system.methodHelp(method)), 10)
        self.assertEqual(proxy.system.methodHelp("nothing"), "")
        self.assertEqual(self.rpc("/").getUser("moshez"), "Happy and well")

    def test_faults_say_what_the_caller_did_wrong(self) -> None:
        proxy = self.rpc()
        no_method, bad_params = -32601, -32602
        for code, method, arguments in [
            *[
                (no_method, name, ("moshez",))
                for name in (
                    "nothing",
                    "get_user",
                    "_dispatch",
                    "getUser.__class__",
                    "system.nothing",
                    "_get_user",
                    "system",
                    "system.multicall.x",
                )
            ],
            *[
                (bad_params, "getUser", arguments)
                for arguments in ((), ("a", "b"), (1,), (["a"],), ({"a": 1},), (True,), (b"a",))
            ],
            (bad_params, "listUsers", (1,)),
            (bad_params, "system.listMethods", (1,)),
            (bad_params, "system.methodHelp", ()),
            (bad_params, "system.methodSignature", (1,)),
            (bad_params, "system.multicall", ("x",)),
            (bad_params, "system.multicall", ([], [])),
        ]:
            with self.subTest(method, arguments=arguments):
                self.assertEqual(self.fault(getattr(proxy, method), *arguments)[0], code)

    def test_the_list_is_made_once_for_a_version_of_the_store(self) -> None:
        store = make_store({"moshez": "old"})
        server = self.server(fingerd.WebServer, store)
        lists = mock.Mock(wraps=server.rpc.funcs["listUsers"])
        server.rpc.register_function(lists, "listUsers")
        with xmlrpc.client.ServerProxy(f"http://127.0.0.1:{server.port}/") as proxy:
            for text in ("old", "new"):
                store.set("moshez", text)
                for _ in range(3):
                    self.assertEqual(proxy.listUsers(), {"moshez": text})
                    self.assertEqual(proxy.getUser("moshez"), text)
        self.assertEqual(lists.call_count, 2)

    def test_multicalls(self) -> None:
        proxy = self.rpc()
        calls = xmlrpc.client.MultiCall(proxy)
        for _ in range(50):
            calls.getUser("moshez")
            calls.getUser("nobody")
        self.assertEqual(list(calls()), ["Happy and well", "No such user"] * 50)
        call = {"methodName": "getUser", "params": ["shawn"]}
        self.fault(proxy.system.multicall, [call] * 101)
        self.assertEqual(proxy.system.multicall([]), [])
        bad = [
            {"methodName": "system.multicall", "params": [[call]]},
            {"methodName": "listUsers", "params": []},
            {"methodName": "nothing", "params": []},
            {"methodName": "getUser", "params": "shawn"},
            {"methodName": "getUser", "params": []},
            {"methodName": 5, "params": []},
            {"params": []},
            {},
            "getUser",
            5,
        ]
        deep = "<array>" * 3_900 + "</array>" * 3_900  # so that even its repr would recurse
        body = xmlrpc.client.dumps(([{"methodName": "deep", "params": []}],), "system.multicall")
        body = body.replace("<string>deep</string>", deep)
        self.assertIn(f"<int>{fingerd.INVALID_PARAMS}</int>", self.service.rpc(body.encode()))
        self.assertNotIn("Traceback", "".join(self.service.log))
        *faults, good = proxy.system.multicall([*bad, call])
        self.assertEqual(good, ["alive"])
        for fault in faults:
            self.assertEqual(set(fault), {"faultCode", "faultString"})
            self.assertNotRegex(fault["faultString"], r"Error|'|<|_")

    def test_conditions_do_not_matter_to_a_call(self) -> None:
        self.assertEqual(self.value(post(CALL, "If-None-Match: *")), "Happy and well")

    def value(self, data: bytes) -> Any:
        """The value, or the fault's code, in the one response to `data`."""
        (answer,) = responses(ask(self.service.port("web"), data))
        self.assertEqual((answer.status, answer.headers["content-type"][:8]), (200, "text/xml"))
        try:
            return xmlrpc.client.loads(answer.body)[0][0]
        except xmlrpc.client.Fault as fault:
            return fault.faultCode

    def test_what_other_clients_send(self) -> None:
        call = xmlrpc.client.dumps(("zo\u00e9",), "getUser")
        latin = b'<?xml version="1.0" encoding="iso-8859-1"?>' + call.encode("latin-1")[22:]
        bare = f"POST / HTTP/1.0\r\nContent-Length: {len(latin)}\r\n\r\n".encode() + latin
        big = call.encode() + b" " * (65536 - len(call.encode()))
        bomb = b'<!DOCTYPE a [<!ENTITY b "c">]>' + call.encode()[22:]
        found = "caf\u00e9 \u2615 <&>"
        for wanted, data in (
            (found, bare),
            (found, post(latin, "Content-Type: text/plain")),
            (found, post(big)),
            (-32700, post(bomb)),
            (-32700, post(b"<methodCall>")),
            (-32700, post(b"")),
        ):
            with self.subTest(data[:60]):
                self.assertEqual(self.value(data), wanted)
        response = xmlrpc.client.dumps(xmlrpc.client.Fault(99, "mine"), methodresponse=True)
        self.assertNotEqual(self.value(post(response.encode(), target="/")), 99)


# ---- plans -------------------------------------------------------------------------------------

PLAN = "* finish the tutorial\n\n\t- then\tsleep \u2615\r\n"
PLAN_LINES = ["* finish the tutorial", "", "        - then  sleep \u2615"]


class PlansTest(SharedCase):
    @classmethod
    def setUpClass(cls) -> None:
        cls.plans = new_folder()
        cls.addClassCleanup(shutil.rmtree, cls.plans)
        for user in ("moshez", "guest"):
            put(cls.plans / user, PLAN)
        cls.options = ("--plans", str(cls.plans))
        super().setUpClass()

    def reader(self, place: Any = "", **load: Any) -> Any:
        """The plans in `place`, for users with and without a status; they may be read slowly."""
        self.patch(PLAN_SECONDS=DEADLINE)
        plans = fingerd.Plans(str(place or self.plans), make_store())
        for name, value in load.items():
            setattr(plans, name, value)
        return plans

    def test_a_plan_becomes_printable_lines(self) -> None:
        line = b"x" * 63 + b"\n"
        rows: list[tuple[bytes, list[str]]] = [  # and the lines
            (b"", []),
            (b"a", ["a"]),
            (PLAN.encode(), PLAN_LINES),
            (b"  a \n\n\n", ["  a", "", ""]),
            (b"a\tb\n1234567\tc\n12345678\td", ["a       b", "1234567 c", "12345678        d"]),
            (b"\x1b[1ma\x00\x9b\n\xe2\x80\xae\xffb\n", ["[1ma\ufffd", "\ufffdb"]),
            ("zoe\u0301\r\n".encode(), ["zo\u00e9"]),
            (b"a\n" * 1000, ["a"] * 1000),
            (b"a\n" * 1001, [*["a"] * 1000, "... (cut)"]),
            (line * 1000 + b"more", [*["x" * 63] * 1000, "... (cut)"]),
            (b"a" * 65_535 + b"\n", ["a" * 65_535]),
            (b"a" * 65_536, ["a" * 65_536]),
            (b"a\n" + b"b" * 65_535, ["a", "b" * 65_534, "... (cut)"]),
            ((b"\t" * 64 + b"\n") * 200, [" " * 512] * 127 + [" " * 385, "... (cut)"]),
        ]
        for data, lines in rows:
            with self.subTest(data[:40]):
                self.assertEqual(fingerd.parse_plan(data), "\n".join(lines))

    def test_answers(self) -> None:
        plan = "".join(f"{line}\r\n" for line in ["Plan:", *PLAN_LINES])
        since = r"Since: 20\d\d-\d\d-\d\d \d\d:\d\d UTC\r\n"
        for query, answer in [
            ("moshez", f"Happy and well\r\n\r\n{plan}"),
            ("MOSHEZ@localhost", f"Happy and well\r\n\r\n{plan}"),
            ("guest", plan),
            ("/W guest", plan),
            ("shawn", "alive\r\n"),
            ("nobody", "No such user\r\n"),
            ("moshez@elsewhere.example", "Finger forwarding service denied\r\n"),
        ]:
            with self.subTest(query):
                self.assertEqual(self.service.finger(query), answer)
        long = self.service.finger("/W moshez")
        pattern = rf"Login: moshez\r\nStatus: Happy and well\r\n{since}\r\n{re.escape(plan)}"
        self.assertRegex(long, rf"\A{pattern}\Z")
        for query in ("", "/W"):
            self.assertNotIn("tutorial", self.service.finger(query))
            self.assertNotIn("guest", self.service.finger(query))

    def test_it_is_read_anew_for_each_query(self) -> None:
        self.addCleanup((self.plans / "shawn").unlink)
        for text in ("one\n", "two\n"):
            put(self.plans / "shawn", text)
            self.assertEqual(self.service.finger("shawn"), f"alive\r\n\r\nPlan:\r\n{text[:-1]}\r\n")
            self.assertIn(f"<pre>\n{text[:-1]}</pre>", self.get("/shawn").body.decode())

    def test_pages(self) -> None:
        put(self.plans / "John Doe", "\n<b>&\n")
        plan = "\n".join(PLAN_LINES)
        for user, text in (("moshez", "Happy and well"), ("guest", "")):
            page = self.get(f"/{user}")
            self.assertEqual(page.status, 200)
            self.assertIn(f"<h2>Plan</h2>\n<pre>\n{plan}</pre>", page.body.decode())
            self.assertNotIn("last-modified", page.headers)
            again = self.get(f"/{user}", f"If-None-Match: {page.headers['etag']}")
            self.assertEqual(again.status, 304)
            answer = json.loads(self.get(f"/{user}?format=json").body)
            self.assertEqual((answer["user"], answer["status"], answer["plan"]), (user, text, plan))
            self.assertEqual(answer["since"] is None, user == "guest")
        self.assertIn(b"<pre>\n\n&lt;b&gt;&amp;</pre>", self.get("/John%20Doe").body)
        self.assertNotIn("plan", json.loads(self.get("/shawn?format=json").body))
        self.assertEqual(self.get("/moshez?format=text").body, b"Happy and well\n")
        for target in (
            "/guest?format=text",
            "/guest?format=atom",
            "/nobody",
            "/nobody?format=json",
        ):
            self.assertEqual(self.get(target).status, 404, target)
        for form in ("html", "text", "json", "atom"):
            self.assertNotIn(b"tutorial", self.get(f"/?format={form}").body)

    def test_xml_rpc(self) -> None:
        proxy = self.rpc()
        for user in ("moshez", "Moshez", "guest"):
            self.assertEqual(proxy.getPlan(user), "\n".join(PLAN_LINES))
        for user in ("shawn", "nobody", "", "../moshez"):
            self.assertEqual(proxy.getPlan(user), "")
        calls = xmlrpc.client.MultiCall(proxy)
        calls.getPlan("guest")
        self.fault(lambda: list(calls()))  # one call would bring a hundred plans

    def test_what_is_no_file_of_the_users_own_is_no_plan(self) -> None:
        folder = self.folder()
        put(folder / "good", "plan\n")
        put(folder / "two names", "plan\n")
        os.link(folder / "two names", folder / "hard link")
        (folder / "symbolic link").symlink_to("good")
        (folder / "dangling").symlink_to("missing")
        (folder / "directory").mkdir()
        os.mkfifo(folder / "fifo")
        unix = self.keep(socket.socket(socket.AF_UNIX))
        unix.bind(str(folder / "socket"))
        if ROOT:
            with contextlib.suppress(PermissionError):  # in some containers
                os.mknod(folder / "device", 0o20666, os.makedev(1, 5))
        put(folder / "unreadable", "plan\n")
        (folder / "unreadable").chmod(0o640)
        plans = self.reader(folder)
        self.assertEqual(plans.read("good"), "plan")
        for path in folder.iterdir():
            if path.name != "good":
                self.assertEqual(plans.read(path.name), "", path.name)

    def test_a_name_that_is_no_file_name_never_reaches_the_file_system(self) -> None:
        plans = self.reader(_load=mock.Mock(side_effect=lambda user, plan: plan.append("plan")))
        for name in ("", ".", "..", "../moshez", "a/b", "/etc/passwd", ".plan", "a:b", "x" * 65):
            self.assertEqual(plans.read(name), "", name)
        plans._load.assert_not_called()
        self.assertEqual(plans.read("Moshez"), "plan")
        plans._load.assert_called_once_with("moshez", ["plan"])

    def account(self, name: str = "moshez", uid: int = 12345, home: Any = None) -> Any:
        """The `--plans home` of a machine with one account, whose plan is there."""
        home = home or self.folder()
        put(home / ".plan", "plan\n")
        if ROOT:
            os.chown(home / ".plan", uid, uid)
        uid = (home / ".plan").stat().st_uid
        found = {name: pwd.struct_passwd((name, "x", uid, uid, "", str(home), "/bin/sh"))}
        patch = mock.patch("pwd.getpwnam", found.__getitem__)
        patch.start()
        self.addCleanup(patch.stop)
        return self.reader("home", _first_uid=min(uid, 1000)), home

    def test_a_persons_own_file_is_the_plan(self) -> None:
        plans, home = self.account()
        self.assertEqual((plans.read("Moshez"), plans.read("nobody")), ("plan", ""))
        (home / ".nofinger").symlink_to("missing")
        self.assertEqual(plans.read("moshez"), "")
        (home / ".nofinger").unlink()
        self.assertEqual(plans.read("moshez"), "plan")
        plans, _ = self.account("nobody")
        self.assertEqual(plans.read("nobody"), "")

    def test_another_users_file_is_no_plan(self) -> None:
        plans, home = self.account()
        other = self.folder() / "secret"
        put(other, "secret\n")
        for replace in (
            lambda: (home / ".plan").symlink_to(other),
            lambda: os.link(other, home / ".plan"),
            lambda: put(home / ".plan", "theirs\n"),  # root's, if root runs this
        ):
            (home / ".plan").unlink()
            replace()
            if ROOT or (home / ".plan").stat().st_nlink != 1 or (home / ".plan").is_symlink():
                self.assertEqual(plans.read("moshez"), "")

    def test_system_accounts_have_no_plan(self) -> None:
        for text, first in (
            ("#\n#UID_MIN 7\nUID_MIN\t\t500 # x\n", 500),
            ("UID_MAX 60000\n", 1000),
        ):
            with mock.patch("pathlib.Path.read_text", return_value=text):
                self.assertEqual(self.reader("home")._first_uid, first)
        with mock.patch("pathlib.Path.read_text", side_effect=FileNotFoundError):
            self.assertEqual(self.reader("home")._first_uid, 1000)
        plans, home = self.account("daemon", 999)
        self.assertEqual(plans.read("daemon"), "plan")
        plans._first_uid = (home / ".plan").stat().st_uid + 1
        self.assertEqual(plans.read("daemon"), "")

    def test_a_disk_that_hangs_costs_the_plan_alone(self) -> None:
        logged, disk = self.watch_log(), threading.Event()
        self.addCleanup(disk.set)
        load = fingerd.Plans._load
        plans = self.reader()
        self.patch(PLAN_SECONDS=0.05)

        def slow(user: str, plan: list[str]) -> None:
            if user != "guest":
                disk.wait()
            load(plans, user, plan)

        plans._load = slow
        server = self.server(fingerd.FingerServer, make_store(), fingerd.Policy(), plans)

        for _ in range(3):
            self.assertEqual(ask(server.port, b"moshez\n"), HAPPY)
        before = threading.active_count()
        begin = time.monotonic()
        in_parallel(100, lambda number: ask(server.port, b"user%d\n" % number))
        self.assertLess(time.monotonic() - begin, 5.0)
        self.assertEqual(ask(server.port, b"guest\n"), b"No such user\r\n")
        until(lambda: threading.active_count() <= before, "the workers end")
        self.assertEqual(sum("does not answer" in line for line in logged), 1)
        disk.set()
        until(lambda: ask(server.port, b"guest\n").startswith(b"Plan:\r\n"))
        self.patch(PLAN_SECONDS=DEADLINE)
        self.assertTrue(ask(server.port, b"moshez\n").endswith("sleep \u2615\r\n".encode()))

    def test_without_the_option_nothing_is_a_job(self) -> None:
        server = self.server(fingerd.FingerServer, make_store())
        self.assertIsInstance(server.reply(b"moshez\n", False, None), fingerd.Reply)
        server.site = server.site._replace(plans=self.reader())
        self.assertTrue(callable(server.reply(b"moshez\n", False, None)))
        self.assertIsInstance(server.reply(b"\n", False, None), fingerd.Reply)

    def test_the_directory_has_to_be_there(self) -> None:
        for place in ("/missing", str(FINGERD)):
            words = command(self.service.users, "--plans", place)
            self.refuses_to_start(words, f"--plans: {place}: not a directory")


# ================================================================================================
# 7. command line: what it takes, what it refuses, and how it starts
# ================================================================================================


class CommandLineTest(Case):
    def users(self, text: str = USERS) -> pathlib.Path:
        """A users file that says `text`."""
        path = self.folder() / "users"
        put(path, text)
        return path

    def test_check(self) -> None:
        path = self.users("oops\n# c\na@b: c\nmoshez: hi\n")
        status, out, err = run([*PROGRAM, "--check", str(path)])
        self.assertEqual((status, err, len(out)), (1, [], 2))
        self.assertRegex(out[0], rf"\A{path}:1: \w+")
        self.assertRegex(out[1], rf"\A{path}:3: \w+")
        for path, count in ((self.users(), 2), (HERE / "users.example", 5)):
            wanted = (0, [f"{count} users, no problems"], [])
            self.assertEqual(run([*PROGRAM, "--check", str(path)]), wanted)

    def test_check_warns_of_lines_for_the_same_user(self) -> None:
        path = self.users("zoé: 1\n\nZoé: 2\nb: 1\nzoé: 3\n")
        wanted = [
            f"{path}:5: replaces an earlier line for zoé (a warning)",
            f"{path}: zoé and Zoé differ only in case (a warning)",
            "3 users, 2 warnings",
        ]
        self.assertEqual(run([*PROGRAM, "--check", str(path)]), (0, wanted, []))

    def test_check_escapes_what_the_locale_lacks(self) -> None:
        path = self.users("zoé: ☕\nzoé: x\n")
        wanted = [
            f"{path}:2: replaces an earlier line for zo\\xe9 (a warning)",
            "1 users, 1 warnings",
        ]
        for env in (
            {"PYTHONIOENCODING": "ascii"},
            {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        ):
            with self.subTest(env):
                self.assertEqual(run([*PROGRAM, "--check", str(path)], env=env), (0, wanted, []))
                out = run([*PROGRAM, "--check", "/nowhere/é"], env=env)
                self.assertEqual((out[0], len(out[2])), (1, 1), out)

    def test_check_says_once_that_a_file_is_utf_16(self) -> None:
        path = self.folder() / "users"
        words = [f"fingerd: {path}: in UTF-16, not in UTF-8"]
        for text, encoding in itertools.product(
            (USERS, "\u0437\u043e\u044f: \u0434\u043e\u043c\u0430\n"),
            ("utf-16", "utf-16-be", "utf-16-le"),
        ):
            put(path, text.encode(encoding))
            self.assertEqual(run([*PROGRAM, "--check", str(path)]), (1, [], words))

    def test_version_and_help(self) -> None:
        self.assertRegex(run([*PROGRAM, "--version"])[1][0], r"\Afingerd [0-9.]+\Z")
        status, out, _ = run([*PROGRAM, "--help"])
        self.assertEqual(status, 0)
        for word in ("USERS", "--finger ADDRESS", "repeatable", "exit status"):
            self.assertIn(word, "\n".join(out))

    def test_wrong_options(self) -> None:
        for wrong, problem in (
            ("", "required: USERS"),
            ("u u", "unrecognized arguments: u"),
            ("--nothing u", "unrecognized arguments: --nothing"),
            ("--interval x u", "--interval: invalid float value: 'x'"),
            ("--interval 0 u", "--interval: not above 0"),
            ("--interval nan u", "--interval: not above 0"),
            ("--interval inf u", "--interval: not above 0, or too long"),
            ("--public-url ftp://x u", "--public-url: 'ftp://x' is not an http"),
        ):
            with self.subTest(wrong):
                err = io.StringIO()
                with self.assertRaises(SystemExit) as caught, contextlib.redirect_stderr(err):
                    fingerd.parse_args(wrong.split())
                self.assertEqual(caught.exception.code, 2)
                self.assertIn(problem, err.getvalue())

    def test_addresses(self) -> None:
        both = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"
        for name, text, host in (
            ("finger", "0", both),
            ("finger", "127.0.0.1:0", "127.0.0.1"),
            ("setter", "0", "127.0.0.1"),
            ("setter", "0.0.0.0:0", "0.0.0.0"),
            ("web", "0", both),
            ("web", "[::1]:0", "::1"),
            ("web", "localhost:0", "127.0.0.1"),
        ):
            if ":" in host and not socket.has_dualstack_ipv6():
                continue
            with self.subTest((name, text)), fingerd.listen(name, text) as listener:
                self.assertEqual(listener.getsockname()[0], host)
        for text in ("", "x", "[::1]", "a:", "a:b:1", "x:y:z", "off"):
            with self.subTest(text), self.assertRaisesRegex(fingerd.StartError, "--web: "):
                fingerd.listen("web", text)
        for option, text in (("--web", "off"), ("--finger", "65536"), ("--setter", "[::1]")):
            words = command(self.users(), option, text, option, "0")
            how = r"write PORT \(0-65535\), HOST:PORT, \[IPV6\]:PORT, or off alone"
            self.refuses_to_start(words, f"{option}: cannot listen on '{re.escape(text)}': {how}")

    @unittest.skipUnless(socket.has_dualstack_ipv6(), "without IPv6")
    def test_a_host_name_may_have_addresses_of_either_kind(self) -> None:
        four, six = socket.getaddrinfo("127.0.0.1", 0), socket.getaddrinfo("::1", 0)
        for found, host in ((six, "::1"), (six + four, "127.0.0.1")):
            patch = mock.patch("socket.getaddrinfo", return_value=found)
            with self.subTest(host), patch, fingerd.listen("web", "name:0") as listener:
                self.assertEqual(listener.getsockname()[0], host)

    def test_a_server_may_have_several_addresses(self) -> None:
        for server, query in (
            ("finger", b"moshez\r\n"),
            ("setter", b"a\nb\n"),
            ("web", request()),
        ):
            with self.subTest(server):
                option = f"--{server}"
                service = self.launch(USERS, option, "127.0.0.1:0", option, "127.0.0.2:0")
                lines = [line for line in service.log if f"{server} listening on" in line]
                places = [line.rpartition(" ")[2].split(":") for line in lines]
                self.assertEqual([host for host, _ in places], ["127.0.0.1", "127.0.0.2"])
                for host, port in places:
                    self.assertRegex(ask(int(port), query, host=host), b"Happy|OK")
                self.assertEqual((service.stop(), service.complaints()), (0, []))

    def test_a_taken_port_is_one_line(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            for server in FACES:
                words = command(self.users(), f"--{server}", f"127.0.0.1:{port}")
                self.refuses_to_start(words, rf"--{server}: .*:{port}': .*in use")

    def test_an_unreadable_users_file_is_one_line(self) -> None:
        file, inside = self.users(), self.users()
        file.chmod(0)
        inside.parent.chmod(0)
        self.addCleanup(inside.parent.chmod, 0o700)
        account = pwd.getpwuid(1 if ROOT else os.getuid())
        see = ", see --run-as" if ROOT else ""
        hint = f" for {account.pw_name}{see}"
        for users, problem in (
            (file, f"{file}: Permission denied{hint}"),
            (inside, f"{inside}: Permission denied{hint}"),
            ("/nowhere/at/all/users", "/nowhere/at/all/users: No such file or directory"),
            ("/dev/null", "/dev/null: not a regular file"),
        ):
            with self.subTest(users):
                self.refuses_to_start(command(users, run_as=""), problem + "$")
        self.assertEqual(run([*PROGRAM, "--check", "/nowhere/users"])[:2], (1, []))

    def test_too_few_descriptors_are_one_line(self) -> None:
        users = self.users()
        program = ("sh", "-c", 'ulimit -n 12; exec "$@"', "sh", *PROGRAM)
        words = command(users, state=users.parent / "state.db", program=program)
        self.refuses_to_start(words, "Too many open files")
        self.assertEqual(list(users.parent.iterdir()), [users], "and leave no state file behind")

    def test_a_python_without_half_its_library_is_one_line(self) -> None:
        code = "import runpy, sys; sys.modules['http'] = None; runpy.run_path({!r})"
        words = [sys.executable, "-c", code.format(str(FINGERD))]
        self.refuses_to_start(words, "http.*Debian: python3, not python3-minimal")

    def test_it_says_what_listens_where(self) -> None:
        service = self.launch(USERS, "--web", "off")
        places = [line for line in service.log if "listening on" in line]
        self.assertEqual(len(places), 2)
        self.assertRegex(places[0], r"finger listening on 127\.0\.0\.1:[1-9]\d*$")
        self.assertRegex(service.log[-1], "ready$")
        service.signal(signal.SIGINT)
        self.assertEqual(service.end(), 0)


# ================================================================================================
# 8. real clients: whatever people have
# ================================================================================================

IN_A_NETWORK = ("unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
PERL = """use RPC::XML::Client; print RPC::XML::Client->new("{web}/RPC2")
->simple_request("getUser", "moshez")"""
RUBY = 'require "xmlrpc/client"; puts XMLRPC::Client.new2("{web}/RPC2").call("getUser", "moshez")'
CHROMIUM = """chromium --headless --no-sandbox --disable-gpu --no-first-run --disable-sync
--disable-background-networking --disable-component-update --user-data-dir={folder}/chromium
--dump-dom"""


@unittest.skipUnless(REAL_CLIENTS, "FINGERD_REAL_CLIENTS=0")
class RealClientsTest(unittest.TestCase):
    """As root they are in a network of our own, where we have the usual ports."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.own, cls.prefix = False, []
        if ROOT and shutil.which("unshare") and shutil.which("nsenter"):
            cls.own = run([*IN_A_NETWORK, "true"])[0] == 0
        if cls.own:
            usual = ("--finger", "79", "--setter", "0.0.0.0:1079", "--web", "8000")
            cls.service = Service(USERS, *usual, program=(*IN_A_NETWORK, *PROGRAM))
            cls.prefix = ["nsenter", "-t", str(cls.service.pid), "-n"]
        else:
            cls.service = Service()
        cls.addClassCleanup(cls.service.close)
        cls.url = f"http://127.0.0.1:{cls.service.port('web')}"

    def client(self, words: list[str], stdin: bytes = b"", hold: bool = False) -> str:
        """What a client prints until it ends; `hold` leaves its input open until then."""
        client = subprocess.Popen(
            [*self.prefix, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "HOME": str(self.service.folder), "TERM": "dumb", "http_proxy": ""},
        )
        timer = threading.Timer(DEADLINE, os.killpg, (client.pid, signal.SIGKILL))
        timer.start()
        try:
            client.stdin.write(stdin)
            client.stdin.flush()
            if not hold:
                client.stdin.close()
            output: str = client.stdout.read().decode("utf-8", "replace")
            with contextlib.suppress(BrokenPipeError):
                client.stdin.close()
            status = client.wait()
        finally:
            timer.cancel()
            client.stdout.close()
        self.assertNotEqual(status, -signal.SIGKILL, f"{words} hung; it had said {output!a}")
        return output

    def commands(self) -> list[tuple[str, bytes, bool, str]]:
        """The command, its input, whether that is left open, and what the output holds."""
        happy, everybody, query = "Happy and well", "shawn: alive", b"moshez\r\n"
        port, web, setter = self.service.port("finger"), self.url, self.service.port("setter")
        usual = [
            ("finger moshez@127.0.0.1", happy),
            ("finger -l moshez@127.0.0.1", "Login: moshez"),
            ("finger @127.0.0.1", everybody),
            ("finger moshez@localhost@127.0.0.1", happy),
            ("finger moshez@elsewhere@127.0.0.1", "forwarding service denied"),
            ("finger moshez@::1", happy),
            ("lynx -dump finger://127.0.0.1/moshez", happy),
            ("links -dump finger://moshez@127.0.0.1/", "Status: " + happy),
            ("elinks -dump finger://moshez@127.0.0.1/", happy),
            ("curl -sS http://[::1]:8000/moshez?format=text", happy),
        ]
        plain = [
            (f"curl -sS gopher://127.0.0.1:{port}/0moshez", happy),
            (f"curl -sS gopher://127.0.0.1:{port}/0/W%20moshez", "Login: moshez"),
            (f"curl -sS {web}/moshez", f"<h1>moshez</h1><p>{happy}</p>"),
            (f"curl -sS --http2 {web}/moshez?format=text", happy),
            (f"curl -sSI {web}/", "HTTP/1.1 200 OK"),
            (f"lynx -dump {web}/", "Happy and well"),
            (f"links -dump {web}/moshez", happy),
            (f"elinks -dump {web}/moshez", happy),
            (f"wget -qO- {web}/moshez", happy),
            (f"xmlrpc {web}/RPC2 getUser s/moshez", happy),
            (f"xmlrpc {web} getUser s/moshez", happy),
            (
                f"{CHROMIUM.format(folder=self.service.folder)} {web}/moshez",
                f"<h1>moshez</h1><p>{happy}</p>",
            ),
        ]
        silent = (usual if self.own else []) + plain
        return [
            *[(words, b"", False, wanted) for words, wanted in silent],
            *[
                (f"{client} 127.0.0.1 {port}", query, False, happy)
                for client in ("nc.openbsd -N", "nc.openbsd", "nc.traditional -q 1")
            ],
            (f"nc.openbsd -N 127.0.0.1 {setter}", b"guest\nhello\n", False, "OK"),
            (f"telnet 127.0.0.1 {port}", query, True, happy),
            (f"curl -sS telnet://127.0.0.1:{port}", query, False, happy),
            (f"curl -sS -H Expect:100-continue --data-binary @- {web}/RPC2", CALL, False, happy),
        ]

    def test_each_gets_the_answer(self) -> None:
        rows = [row for row in self.commands() if shutil.which(row[0].split()[0])]
        if not rows:
            self.skipTest("no client is installed")
        with ThreadPoolExecutor(4) as pool:  # they wait, mostly
            outputs = [pool.submit(self.client, row[0].split(), row[1], row[2]) for row in rows]
            for (words, _, _, wanted), output in zip(rows, outputs):
                with self.subTest(words):
                    self.assertIn(wanted, output.result())

    def test_xml_rpc_in_other_languages(self) -> None:
        for words, module, script in (
            ("perl", "-MRPC::XML::Client", PERL),
            ("ruby", "-rxmlrpc/client", RUBY),
        ):
            with self.subTest(words):
                if not shutil.which(words) or self.client([words, module, "-e", "1"]):
                    self.skipTest(f"no XML-RPC for {words}")
                script = script.replace("{web}", self.url)
                self.assertIn("Happy and well", self.client([words, "-e", script]))

    @needs("tidy", "curl")
    def test_tidy_finds_nothing_wrong_with_the_pages(self) -> None:
        for target in ("/", "/moshez", "/nobody"):
            page = self.client(["curl", "-sS", self.url + target])
            self.assertEqual(self.client(["tidy", "-q", "-e"], page.encode()), "", target)

    def test_a_setter_for_everybody_is_warned_of(self) -> None:
        if not self.own:
            self.skipTest("not in a network of our own")
        self.assertIn("WARNING", self.service.wait_for(r"anybody's message|may set"))


ELSEWHERE = """<!DOCTYPE html><body><script>
const read = (port, path, options) => fetch(`http://127.0.0.1:${port}${path}`, options)
    .then(answer => answer.text(), () => "refused");
const call = {method: "POST", body: "<methodCall><methodName>listUsers</methodName></methodCall>"};
const read_all = async port => [
    await read(port, "/moshez?format=text"),
    await read(port, "/moshez?format=text", {headers: {"If-None-Match": "x"}}),
    await read(port, "/RPC2", call), await read(port, "/", call)].join("; ");
(async () => document.body.append(await read_all(%d), await read_all(%d)))();
</script>"""


class BrowserTest(Case):
    @needs("chromium")
    def test_pages_elsewhere_may_read_a_public_server_and_no_other(self) -> None:
        public, plain = self.launch(USERS, "--public-url", "http://h/"), self.launch()
        page = self.folder() / "page.html"
        page.write_text(ELSEWHERE % (public.port("web"), plain.port("web")))
        chromium = CHROMIUM.format(folder=page.parent)
        _, out, _ = run([*chromium.split(), "--virtual-time-budget=5000", page.as_uri()])
        readable, refused = (
            "Happy and well\n; " * 2 + "refused; refused",
            "; ".join(["refused"] * 4),
        )
        self.assertIn(readable + refused, "\n".join(out))


# ================================================================================================
# 9. IRC: codec, session and options by tables; the bot on fake and real servers
# ================================================================================================


class Talk:
    """An IrcSession with a clock that the test moves."""

    def __init__(self, store: fingerd.StatusStore | None = None, **options: Any) -> None:
        self.now = 1000.0
        self.store = store or make_store()
        self.log: list[str] = []
        irc = fingerd.IrcOptions(("irc.test", 6697), **options)
        self.session = fingerd.IrcSession(irc, self.store, self.log.append, self.now)
        self.hello = self.said()

    def hear(self, *lines: str) -> Talk:
        for line in lines:
            self.session.receive(line.encode(), self.now)
        return self

    def pass_time(self, seconds: float) -> Talk:
        self.now += seconds
        self.session.tick(self.now)
        return self

    def said(self) -> list[str]:
        """All waiting lines, sent at their pace."""
        sent = b""
        while self.session.queue:
            sent += self.session.take(self.now)
            self.now += bool(self.session.queue)
        return sent.decode().split("\r\n")[:-1]

    def register(self, nick: str = "fingerbot") -> Talk:
        self.hear(f":irc.test 001 {nick} :Welcome")
        for name in self.session.channels:
            self.hear(f":{nick}!~fingerd@our.host JOIN {name}")
        self.said()
        return self.pass_time(60)


class IrcEnd:
    """One end of an IRC connection."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(DEADLINE)
        self.sock, self.file = sock, sock.makefile("rb")

    def say(self, *lines: str) -> None:
        self.sock.sendall("".join(f"{line}\r\n" for line in lines).encode())

    def hear(self, part: str = "") -> str:
        """The next line that holds `part`; each PING before it is answered."""
        heard = []
        for raw in self.file:
            heard.append(raw.decode().rstrip("\r\n"))
            if heard[-1].startswith("PING"):
                self.say(heard[-1].replace("PING", "PONG", 1))
            if part in heard[-1]:
                return heard[-1]
        raise AssertionError(f"{part!r} is not in {heard[-5:]}")

    def register(self) -> IrcEnd:
        self.hear("USER ")
        self.say(":irc.test 001 fingerbot :Welcome")
        return self

    def close(self) -> None:
        self.file.close()
        self.sock.close()


class IrcCase(Case):
    """Bots that are stopped at the end, and their log."""

    def setUp(self) -> None:
        self.log = self.watch_log()
        fingerd.log.info("watch_log() wants a line, and not every bot logs one")
        self.patch(IRC_LINE_SECONDS=0.001, IRC_RETRY_SECONDS=0.05, IRC_LONGEST_RETRY_SECONDS=0.05)
        self.store = make_store()

    def logged(self, part: str, count: int = 1) -> str:
        """The log line that is the `count`th to hold `part`."""

        def found() -> list[str]:
            return [line for line in self.log if part in line][count - 1 :]

        line: str = until(found, f"{part!r} in the log")[0]
        return line

    def start_bot(self, port: int, host: str = "127.0.0.1", **options: Any) -> Any:
        irc = fingerd.IrcOptions((host, port), **{"tls": False, **options})
        bot = fingerd.IrcBot(irc, self.store)
        bot.start()
        self.addCleanup(self.stop_bot, bot)
        return bot

    def stop_bot(self, bot: Any) -> None:
        """Stop the bot, which has to end in STOP_SECONDS."""
        bot.stopping.set()
        bot.join(fingerd.STOP_SECONDS)
        self.assertFalse(bot.is_alive())


def openssl(arguments: str) -> str:
    words = ["openssl", *arguments.split()]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def make_certificate(folder: pathlib.Path) -> tuple[pathlib.Path, str]:
    """A file with key and certificate for localhost, which everybody may read, and its SHA-256."""
    path = folder / "both.pem"
    openssl(
        f"req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 "
        f"-subj /CN=localhost -addext subjectAltName=DNS:localhost -keyout {path} -out {path}"
    )
    path.chmod(0o644)  # a server may give up being root
    digest = openssl(f"x509 -noout -fingerprint -sha256 -in {path}")
    return path, digest.partition("=")[2].strip().replace(":", "").lower()


# ---- codec, session and options ---------------------------------------------------------------


class IrcCodecTest(Case):
    def test_lines_are_parsed(self) -> None:
        for raw, line in [
            (b"PING x\r", fingerd.IrcLine("", "", "PING", ["x"])),
            (b"ping", fingerd.IrcLine("", "", "PING", [])),
            (b":a!b@c PRIVMSG d :e  :f ", fingerd.IrcLine("", "a!b@c", "PRIVMSG", ["d", "e  :f "])),
            (b"@x=1;b :s  1  a   b", fingerd.IrcLine("x=1;b", "s", "1", ["a", "b"])),
            (b"A :", fingerd.IrcLine("", "", "A", [""])),
            (b"A b:c :", fingerd.IrcLine("", "", "A", ["b:c", ""])),
            (b":only", fingerd.IrcLine("", "only", "", [])),
            (b"@only", fingerd.IrcLine("only", "", "", [])),
            (b" :only", fingerd.IrcLine("", "", "", ["only"])),
            (b"", fingerd.IrcLine("", "", "", [])),
            ("A é".encode(), fingerd.IrcLine("", "", "A", ["é"])),
            ("A é".encode("latin-1"), fingerd.IrcLine("", "", "A", ["\ufffd"])),
        ]:
            with self.subTest(raw=raw):
                self.assertEqual(fingerd.parse_irc_line(raw), line)

    def test_formatting_is_parsing_backwards(self) -> None:
        for line in [["A", "b"], ["A", "b", "c d"], ["A", ""], ["A", ":b"], ["A", "b", "é :c"]]:
            parsed = fingerd.parse_irc_line(fingerd.format_irc_line(*line).rstrip(b"\n"))
            self.assertEqual([parsed.command, *parsed.params], line)

    def test_no_line_end_gets_in(self) -> None:
        self.assertEqual(fingerd.format_irc_line("A", "b\r\nQUIT\0", "\nc"), b"A bQUIT c\r\n")

    def test_persons_are_told_from_programs(self) -> None:
        for source, is_person in {
            "ann!ann@example.org": True,
            "serv!serv@services-fan.example.org": True,
            "Server!~user@example.org": True,
            "irc.test": False,
            "": False,
            "*status!znc@znc.in": False,
            "***!znc@znc.in": False,
            "-psyBNC!psyBNC@lam3rz.de": False,
            "BouncerServ!BouncerServ@soju.example": False,
            "NickServ!NickServ@services.libera.chat": False,
            "NickServ!services@services.oftc.net": False,
            "Global!service@rizon.net": False,
            "X!cservice@undernet.org": False,
            "Q!TheQBot@CServe.quakenet.org": False,
            "otherbot!fingerd@example.org": False,
            "otherbot!~fingerd@example.org": False,
        }.items():
            with self.subTest(source):
                line = fingerd.parse_irc_line(f":{source} PRIVMSG fingerbot :x".encode())
                self.assertEqual(fingerd.is_person(line), is_person)

    def test_delay_doubles_up_to_the_cap(self) -> None:
        self.assertEqual([fingerd.reconnect_delay(n, 0) for n in range(4)], [2, 4, 8, 16])
        self.assertEqual(fingerd.reconnect_delay(1, 0.5), 5)
        for jitter in (0, 0.999):
            self.assertEqual(fingerd.reconnect_delay(10**9, jitter), 600)


class IrcSessionTest(Case):
    def test_registration(self) -> None:
        account = {"account": "finger", "password": "secret"}
        cert = {"account": "finger", "certificate": "file", "password": "the server's"}
        hello, tags = [":irc.test 001 x :Welcome"], "CAP REQ message-tags"
        for title, options, lines, said in [
            ("ping", {}, ["PING :a b"], ["PONG :a b"]),
            ("ack", {}, [*hello, "CAP x ACK :message-tags"], [tags]),
            ("nak", {}, [*hello, "CAP x NAK :message-tags"], [tags]),
            ("del", {}, [*hello, "CAP x DEL :message-tags"], [tags]),
            ("no cap known", {}, [*hello, ":s 421 x CAP :Unknown command"], [tags]),
            ("half a cap", {}, ["CAP", "CAP *", "CAP * ACK"], []),
            ("sasl ack", account, ["CAP * ACK :sasl "], ["AUTHENTICATE PLAIN"]),
            ("sasl go", account, ["AUTHENTICATE +"], ["AUTHENTICATE AGZpbmdlcgBzZWNyZXQ="]),
            ("sasl done", account, [":s 903 * :ok"], ["CAP END"]),
            ("external ack", cert, ["CAP * ACK :sasl"], ["AUTHENTICATE EXTERNAL"]),
            ("external go", cert, ["AUTHENTICATE +"], ["AUTHENTICATE +"]),
            ("taken", {}, [":s 433 * fingerbot :Taken"], ["NICK fingerbo_"]),
            ("too long", {"nick": "a" * 20}, [":s 432 * a :b"], ["NICK aaaaaaaa_"]),
            ("join", {"channels": ("#a", "#b")}, hello, [tags, "JOIN #a", "JOIN #b"]),
            ("keys", {"channels": ("#a", "#b k")}, hello, [tags, "JOIN #a", "JOIN #b k"]),
        ]:
            with self.subTest(title):
                self.assertEqual(Talk(**options).hear(*lines).said(), said)

    def test_it_says_first_who_it_is(self) -> None:
        server, sasl = "PASS :a b", "CAP REQ sasl"
        user = "USER fingerd 0 * :A bot, the finger service: send it a user's name"
        names = ["NICK fingerbot", user]
        for options, said in [
            ({}, names),
            ({"password": "a b"}, [server, *names]),
            ({"certificate": "file"}, names),
            ({"password": "a b", "account": "c"}, [sasl, *names]),
            ({"account": "c", "certificate": "file"}, [sasl, *names]),
            ({"password": "a b", "account": "c", "certificate": "file"}, [server, sasl, *names]),
        ]:
            with self.subTest(options):
                self.assertEqual(Talk(**options).hello, said)

    def test_what_ends_a_connection(self) -> None:
        account = {"account": "finger", "password": "secret"}
        for title, options, line in [
            ("secret is wrong", account, ":s 904 * :secret is wrong"),
            ("EXTERNAL are", account, ":s 908 * EXTERNAL :are available"),
            ("banned", {}, ":s 465 * :You are banned"),
            ("refuses SASL", account, "CAP * NAK :sasl"),
            ("has no SASL", account, ":s 001 x :Welcome"),
            ("Too fast", {}, "ERROR :Too fast"),
        ]:
            with self.subTest(title):
                talk = Talk(**options)
                with self.assertRaisesRegex(ConnectionError, title.replace("secret", r"\*\*\*")):
                    talk.hear(line)

    def test_no_secret_reaches_the_log(self) -> None:
        account, password = "finger", "correct horse " * 20
        (line,) = Talk(account=account, password=password).hear("AUTHENTICATE +").said()
        payload = line.partition(" ")[2]
        for title, repeated, logged in [
            ("the password", password.strip(), "***"),
            ("in brackets", f"({password.strip()})", "(***)"),
            ("the payload", payload, "***"),
            ("in brackets, too", f"<{payload}>", "<***>"),
            ("a key", "(the sesame of #a)", "(the *** of #a)"),
            ("another word", "AUTHENTICATE", "AUTHENTICATE"),
            ("a long text", "x" * 400, "x" * 194),
        ]:
            with self.subTest(title):
                channels = ("#a sesame",)
                talk = Talk(account=account, password=password, channels=channels)
                with self.assertRaises(ConnectionError) as failure:
                    talk.hear(f":s 904 * {repeated} :is wrong")
                said, _, quoted = str(failure.exception).partition(": ")
                self.assertEqual(said, "the server says")
                self.assertEqual(quoted, f"904 * {logged} is wrong"[:200])

    def test_it_gives_up_when_no_nick_is_free(self) -> None:
        for number in ("432", "433", "436", "437"):
            talk = Talk().hear(f":s {number} * a :b")
            self.assertEqual(talk.said()[-1], "NICK fingerbo_")
            with self.assertRaisesRegex(ConnectionError, "none of our nicks"):
                talk.hear(f":s {number} * a :b")
        talk = Talk(nick="fingerbo_").hear(":s 433 * a :b")
        self.assertEqual(talk.said()[-1], "NICK fingerbo-")

    def test_answers(self) -> None:
        long_name = "n" * 70
        for target, text, said in [
            ("fingerbot", "moshez", "PRIVMSG ann :moshez: Happy and well"),
            ("fingerbot", " \x02moshez\x0f ", "PRIVMSG ann :moshez: Happy and well"),
            ("fingerbot", "!finger moshez", "PRIVMSG ann :moshez: Happy and well"),
            ("FINGERBOT", "nobody", "PRIVMSG ann :nobody: No such user"),
            ("fingerbot", "Moshez", "PRIVMSG ann :moshez: Happy and well"),
            ("#a", "!finger MOSHEZ", "PRIVMSG #a :moshez: Happy and well"),
            ("fingerbot", "a b\0c", "PRIVMSG ann :a bc: No such user"),
            ("fingerbot", "!! x", "PRIVMSG ann :x: No such user"),
            ("fingerbot", "moshez [08:35:17]", None),
            ("fingerbot", "[08:35:17] moshez", None),
            ("#a", "[08:35:17] !finger moshez", None),
            ("#a", "fingerbot: No such user", None),
            ("fingerbot", long_name, f"PRIVMSG ann :{long_name[:64]}: No such user"),
            ("fingerbot", "\x03", None),
            ("fingerbot", "", None),
            ("#A", "!Finger moshez", "PRIVMSG #A :moshez: Happy and well"),
            ("#a", "FingerBot: moshez", "PRIVMSG #a :moshez: Happy and well"),
            ("#a", "fingerbot, moshez", "PRIVMSG #a :moshez: Happy and well"),
            ("#a", "moshez", None),
            ("#a", "!finger", None),
            ("#a", "!fingers moshez", None),
            ("#a", "fingerbot moshez", None),
            ("#b", "!finger moshez", None),
            ("fingerbot", "\x01VERSION\x01", None),
            ("fingerbot", "\x01ACTION waves\x01", None),
            ("fingerbot", "\x01", None),
            ("#a", "\x01VERSION\x01", None),
        ]:
            with self.subTest(target=target, text=text):
                talk = Talk(channels=("#a",)).register()
                talk.hear(f":ann!b@c PRIVMSG {target} :{text}")
                self.assertEqual(talk.said(), [said] if said else [])

    def test_a_reply_is_no_command_for_other_bots(self) -> None:
        for sign in "!.,@+-?~%&$;`\\":
            with self.subTest(sign):
                talk = Talk(channels=("#a",)).register()
                for name in ("op", " é", sign + "x", "1", ":", ""):
                    talk.hear(f":ann!b@c PRIVMSG fingerbot :{sign}{name}")
                texts = [line.partition(" :")[2].partition(":")[0] for line in talk.said()]
                self.assertEqual(texts, ["op", "é", "x", f"{sign}1", sign, sign])
                talk.store.set(f"{sign}op", "bad")
                self.assertEqual(talk.pass_time(1).said(), ["PRIVMSG #a :op: bad"])

    def test_two_bots_do_not_talk_to_each_other(self) -> None:
        namesakes = {"one": "three", "two": "one"}
        for source, texts in [
            ("x!~fingerd@host", namesakes),
            ("x!hidden@host", namesakes),
            ("x!hidden@host", {}),
        ]:
            store = make_store(texts)
            talks = {
                nick: Talk(store, nick=nick, channels=("#a",)).register(nick)
                for nick in ("one", "two")
            }
            waiting = [("ann!b@c", "PRIVMSG #a :one: two")]
            passed = []
            while waiting and len(passed) < 30:
                sender, line = waiting.pop()
                passed.append(line)
                for nick, talk in talks.items():
                    if nick != sender.partition("!")[0]:
                        said = talk.hear(f":{sender} {line}").said()
                        waiting += [(source.replace("x", nick, 1), text) for text in said]
            with self.subTest(source, texts=texts):
                self.assertEqual(len(passed), 2, passed)

    def test_who_is_not_answered(self) -> None:
        for line in [
            ":*status!znc@znc.in PRIVMSG fingerbot :Unknown command [moshez]",
            ":NickServ!services@services.oftc.net PRIVMSG fingerbot :moshez",
            ":ann!b@c NOTICE fingerbot :moshez",
            ":irc.test PRIVMSG fingerbot :moshez",
            "PRIVMSG fingerbot :moshez",
            ":fingerbot!~fingerd@our.host PRIVMSG fingerbot :moshez",
            "@time=x;bot :ann!b@c PRIVMSG fingerbot :moshez",
            "@inspircd.org/bot :ann!b@c PRIVMSG fingerbot :moshez",
            ":ann!b@c PRIVMSG fingerbot",
            ":ann!b@c PRIVMSG",
        ]:
            with self.subTest(line):
                self.assertEqual(Talk().register().hear(line).said(), [])

    def test_a_long_answer_fits_the_line(self) -> None:
        channel = "#" + "c" * 199  # as long as servers allow
        for source, target, said_to in [
            ("n" * 30, "fingerbot", "n" * 30),
            ("ann", "#a", "#a"),
            ("ann", channel, channel),
        ]:
            for name, text in {"long": "é+", "emoji": "(\U0001f642)+"}.items():
                with self.subTest(said_to, name=name):
                    talk = Talk(channels=("#a", channel)).register()
                    talk.store.set("emoji", "\U0001f642" * 500)
                    talk.session.version = talk.store.now.version  # not to be announced
                    talk.hear(f":{source}!b@c PRIVMSG {target} :!finger {name}")
                    received = f":{'x' * 30}!~fingerd@{'x' * 63} {talk.said()[0]}\r\n"
                    self.assertRegex(received, f" PRIVMSG {said_to} :{name}: {text}\r\n$")
                    self.assertIn(len(received.encode()), range(490, 513))

    def test_nick_is_what_the_server_says(self) -> None:
        talk = Talk().hear(":s 433 * fingerbot :Taken").register("fingerbo_")
        self.assertEqual(talk.pass_time(29).said(), [])
        self.assertEqual(talk.pass_time(1).said(), ["PING fingerd", "NICK fingerbot"])
        talk.hear(":s 433 fingerbo_ fingerbot :Taken")
        talk.now = 1150
        self.assertEqual(talk.pass_time(29).said(), [])
        self.assertEqual(talk.pass_time(1).said(), ["PING fingerd", "NICK fingerbot"])
        talk.hear(":fingerbo_!a@b NICK :fingerbot", ":ann!a@b PRIVMSG fingerbot :moshez")
        self.assertEqual(len(talk.said()), 1)
        self.assertEqual(talk.pass_time(90).said(), ["PING fingerd"])

    def test_changes_are_announced(self) -> None:
        talk = Talk(channels=("#a",)).register()
        talk.store.set("moshez", "Giving a tutorial now, sorry!")
        line = "PRIVMSG #a :moshez: Giving a tutorial now, sorry!"
        self.assertEqual(talk.pass_time(1).said(), [line])
        self.assertEqual(talk.pass_time(1).said(), [])
        for number in range(15):
            talk.store.set(f"user{number}", "old")
            talk.store.set(f"user{number}", "new")
        lines = [f"PRIVMSG #a :user{number}: new" for number in range(3)]
        self.assertEqual(talk.pass_time(1).said(), [*lines, "PRIVMSG #a :and 12 more"])
        self.assertEqual(talk.log, ["registered as fingerbot", "joined #a"])

    def test_a_status_that_returns_is_announced(self) -> None:
        talk = Talk(channels=("#a",)).register()
        for user in ("moshez", "newcomer"):
            talk.store.set(user, "out", until=time.time() + 60)
        lines = ["PRIVMSG #a :moshez: out", "PRIVMSG #a :newcomer: out"]
        self.assertEqual(talk.pass_time(1).said(), lines)
        talk.store.expire(time.time() + 61)
        self.assertEqual(talk.pass_time(1).said(), ["PRIVMSG #a :moshez: Happy and well"])

    def attempts(self, talk: Talk, seconds: float, *replies: str) -> list[float]:
        """How many seconds after now the session sends a JOIN, each answered by the replies."""
        talk.said()
        start, moments = talk.now, []
        while talk.now < start + seconds:
            talk.hear("x").pass_time(1)
            if any(line.startswith("JOIN") for line in talk.said()):
                moments.append(talk.now - start)
                talk.hear(*replies)
        return moments

    def test_a_channel_that_refuses_is_asked_again(self) -> None:
        numerics = "403 405 437 471 473 474 475 476 477 479 485 489 495 520 926"
        for numeric in numerics.split():
            refusal = f":s {numeric} fingerbot #A :No way"
            with self.subTest(numeric):
                talk = Talk(channels=("#a",)).hear(":s 001 fingerbot :Welcome", refusal)
                moments = self.attempts(talk, 2500, refusal)
                self.assertEqual(moments, [90, 270, 630, 1230, 1830, 2430])
                self.assertEqual(talk.log[1:], [f"#a refuses us ({numeric}): No way"])
                talk.hear(":fingerbot!a@b JOIN #a").store.set("moshez", "here")
                self.assertEqual(talk.pass_time(1).said(), ["PRIVMSG #a :moshez: here"])

    def test_more_channels_than_lines_may_wait(self) -> None:
        names = [f"#{number}" for number in range(30)]
        talk, wanted = Talk(channels=names).hear(":s 001 fingerbot :Welcome"), set(names)
        for _ in range(100):
            for line in talk.pass_time(1).said():
                command, name = line.split(" ", 1)
                if command == "JOIN":
                    wanted.discard(name)
                    talk.hear(f":fingerbot!a@b JOIN {name}")
        self.assertEqual(wanted, set())

    def test_a_join_without_any_reply_is_repeated(self) -> None:
        talk = Talk(channels=("#a",)).hear(":s 001 fingerbot :Welcome")
        self.assertEqual(self.attempts(talk, 700), [90, 270, 630])

    def test_a_new_registration_asks_again(self) -> None:
        talk = Talk(channels=("#a", "#b")).register().hear(":ann!b@c KICK #a fingerbot :out")
        self.assertEqual(talk.hear(":s 001 fingerbot :Welcome").said()[1:], ["JOIN #a", "JOIN #b"])
        talk.store.set("moshez", "new")
        self.assertEqual(talk.pass_time(1).said(), [])
        talk.hear(":fingerbot JOIN :#a").pass_time(1)  # as from a bouncer
        self.assertEqual(talk.said(), ["PRIVMSG #a :moshez: new"])

    def test_each_kind_of_refusal_is_logged_once(self) -> None:
        joined = ":fingerbot!a@b JOIN #a"
        for lines, logged in [
            ([":s 404 x #a :moderated"] * 3, ["#a refuses us (404): moderated"]),
            (
                [":s 473 x #a :+i", ":s 474 x #A :+b", ":s 473 x #a :+i"],
                ["#a refuses us (473): +i", "#a refuses us (474): +b"],
            ),
            (
                [":s 404 x #a :+m", joined, ":s 404 x #a :+m"],
                ["#a refuses us (404): +m", "joined #a"],
            ),
            ([":s 475 x #b :key", ":s 353 x #a :key", ":s 404 x"], []),
        ]:
            with self.subTest(lines):
                talk = Talk(channels=("#a",)).register().hear(*lines)
                self.assertEqual(talk.log[2:], logged)

    def test_the_channel_that_we_are_forwarded_to_is_left(self) -> None:
        here, reason = ":fingerbot!a@b JOIN", "#a refuses us (470): ##a Forwarding"
        forwarded = ":s 470 x #a ##a :Forwarding"
        other = ["#a refuses us (470): #B Forwarding", "joined #b"]
        for lines, said, logged in [
            ([forwarded, f"{here} ##a"], ["PART ##a"], [reason]),
            ([forwarded, f"{here} ##a"] * 2, ["PART ##a"] * 2, [reason]),
            ([":s 470 x #a #B :Forwarding", f"{here} #B"], [], other),
            # Not forwarded: whoever shares our bouncer joins other channels.
            ([f"{here} :##a"], [], []),
            ([":s 470 x #c ##a :Forwarding", f"{here} ##a"], [], []),
            ([forwarded, f"{here} ##a", f"{here} ##a"], ["PART ##a"], [reason]),
            ([forwarded, ":ann!a@b JOIN ##a", f"{here} ##c"], [], [reason]),
        ]:
            with self.subTest(lines):
                talk = Talk(channels=("#a", "#b")).hear(":s 001 fingerbot :Welcome")
                talk.said()
                self.assertEqual(talk.hear(*lines).said(), said)
                self.assertEqual(talk.log[1:], logged)

    def test_out_of_a_channel(self) -> None:
        part = "out of a channel: fingerbot!a@b PART #a bye"
        kick = "out of a channel: ann!b@c KICK #a fingerbot out"
        invited = ":ann!b@c INVITE fingerbot :#A"
        for title, lines, moments, logged in [
            ("PART", [":fingerbot!a@b PART #a :bye"], [90, 180, 360], [part]),
            ("KICK", [":ann!b@c KICK #a fingerbot :out"], [], [kick]),
            ("INVITE", [":ann!b@c KICK #a fingerbot :out", invited], [1, 91, 271], [""]),
            ("INVITE elsewhere", [":ann!b@c INVITE fingerbot #c"], [], []),
            ("INVITE of another", [":ann!b@c INVITE bob #a"], [], []),
            ("INVITE of no use", [invited], [], []),
            ("PART of another", [":ann!b@c PART #a"], [], []),
            ("KICK of another", [":ann!b@c KICK #a bob"], [], []),
            ("PART from elsewhere", [":fingerbot!a@b PART #c"], [], []),
        ]:
            with self.subTest(title):
                talk = Talk(channels=("#a",)).register().hear(*lines)
                talk.store.set("moshez", "new")
                if logged:
                    self.assertEqual(len(talk.log), 3)
                    self.assertIn(logged[0], talk.log[2])
                    self.assertEqual(self.attempts(talk, 500), moments)
                else:
                    self.assertEqual(talk.pass_time(1).said(), ["PRIVMSG #a :moshez: new"])

    def test_invitations_are_counted(self) -> None:
        talk = Talk(channels=("#a",)).register().hear(":ann!b@c KICK #a fingerbot :out")
        joins = 0
        for _ in range(25):
            talk.hear(":ann!b@c INVITE fingerbot #a").pass_time(1)
            joins += talk.said().count("JOIN #a")
        self.assertEqual(joins, fingerd.IRC_QUERIES)

    def test_lines_go_at_a_steady_pace(self) -> None:
        talk = Talk().register()
        session = talk.session
        for number in range(11):
            talk.hear(f":ann!b@c{number} PRIVMSG fingerbot :moshez")
        talk.hear("PING x")
        burst = session.take(talk.now)
        self.assertEqual((burst[:6], burst.count(b"\n")), (b"PONG x", 5))
        self.assertEqual([session.take(talk.now + after) for after in (1, 1.9)], [b"", b""])
        self.assertEqual(session.take(talk.now + 2).count(b"\n"), 1)
        counts = [session.take(talk.now + after).count(b"\n") for after in (30, 30, 32)]
        self.assertEqual(counts, [5, 0, 1])
        self.assertEqual(len(session.queue), 0)

    def test_questions_do_not_displace_what_the_server_is_to_be_told(self) -> None:
        talk = Talk(channels=("#a",)).hear(":irc.test 001 fingerbot :Welcome")
        for number in range(40):
            talk.hear(f":ann!b@c{number} PRIVMSG fingerbot :moshez")
        talk.hear("PING x")
        self.assertEqual(talk.said()[:3], ["PONG x", "CAP REQ message-tags", "JOIN #a"])

    def test_who_asks_too_often_is_ignored(self) -> None:
        talk = Talk().register()
        for _ in range(13):
            talk.hear(":ann!b@c PRIVMSG fingerbot :moshez")
        talk.hear(":ann!b@d PRIVMSG fingerbot :moshez")
        self.assertEqual(len(talk.said()), 13)
        self.assertEqual(talk.hear(":other!b@c PRIVMSG fingerbot :moshez").said(), [])
        self.assertEqual(talk.pass_time(90).said(), ["PING fingerd"])
        self.assertEqual(len(talk.hear(":ann!b@c PRIVMSG fingerbot :moshez").said()), 1)

    def test_tables_are_bounded(self) -> None:
        talk = Talk().register()
        for number in range(2000):
            talk.hear(f":a!b@{number} PRIVMSG fingerbot :x", "PING x")
        session = talk.session
        self.assertLessEqual(len(session.askers), fingerd.IRC_RECENT)
        self.assertEqual(len(session.queue), fingerd.IRC_QUEUE_LINES)

    def test_silence_ends_it(self) -> None:
        talk = Talk().register().hear("PING x")
        self.assertEqual(talk.pass_time(29).said(), ["PONG x"])
        self.assertEqual(talk.pass_time(1).said(), ["PING fingerd"])
        talk.pass_time(89).hear("PONG x")
        self.assertEqual(talk.pass_time(1).said(), ["PING fingerd"])
        talk.pass_time(89)
        with self.assertRaisesRegex(ConnectionError, "no longer replies"):
            talk.pass_time(1)
        with self.assertRaisesRegex(ConnectionError, "does not register us"):
            Talk().pass_time(90)

    def test_any_line_is_survived(self) -> None:
        chance = random.Random(1)
        handlers = [name for name in dir(fingerd.IrcSession) if name.startswith("on_")]
        words = [name.rpartition("_")[2] for name in handlers]
        parts = [b":", b" ", b"fingerbot", b"#a", b"!", b"\x01", b"@", b"=", b"\xff", b"*", b"LS"]
        for number in range(5000):
            if number % 100 == 0:
                talk = Talk(channels=("#a",)).register()
            command = chance.choice(words).encode()
            line = chance.choice([b"", b":a!b@c ", b":fingerbot!b@c ", b":fingerbot "])
            line += command + b" " * chance.randrange(2)
            line += b"".join(chance.choice(parts) for _ in range(chance.randrange(9)))
            with contextlib.suppress(ConnectionError):
                talk.session.receive(line, talk.now)


class IrcOptionsTest(Case):
    def read(self, *words: str, **environ: str) -> fingerd.IrcOptions:
        with mock.patch.dict(os.environ, environ):
            return fingerd.irc_options(fingerd.parse_args(["--irc", "a", *words, "users"]))

    def test_what_is_read(self) -> None:
        for words, changed in [
            (["--irc", "a.b"], {"server": ("a.b", 0)}),
            (["--irc", "a.b:7000"], {"server": ("a.b", 7000)}),
            (["--irc", "[::1]", "--irc-plaintext"], {"server": ("::1", 0), "tls": False}),
            (["--irc", "[::1]:7000"], {"server": ("::1", 7000)}),
            (["--irc-fingerprint", "AB:" * 31 + "CD"], {"fingerprint": "ab" * 31 + "cd"}),
            (["--irc-channel", "#a", "--irc-channel", "#b key"], {"channels": ["#a", "#b key"]}),
            (
                ["--irc-nick", "b", "--irc-account", "c", "--irc-certificate", "d.pem"],
                {"nick": "b", "account": "c", "certificate": "d.pem"},
            ),
        ]:
            options = fingerd.IrcOptions(**{"server": ("a", 0), **changed})
            with self.subTest(words):
                self.assertEqual(self.read(*words), options)

    def test_where_the_password_comes_from(self) -> None:
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"from file\nrest")
            file.flush()
            words, environ = ["--irc-account", "b"], {"FINGERD_IRC_PASSWORD": "from environment"}
            self.assertEqual(self.read(*words, **environ).password, "from environment")
            words += ["--irc-password-file", file.name]
            self.assertEqual(self.read(*words, **environ).password, "from file")

    def test_a_log_in_without_tls_stays_on_this_machine(self) -> None:
        log_ins: list[Any] = [([], {"FINGERD_IRC_PASSWORD": "c"}), (["--irc-account", "b"], {})]
        for words, environ in log_ins:
            for host in ("localhost", "127.0.0.1", "127.1.2.3:6667", "[::1]", "[::1]:6667"):
                self.assertFalse(self.read("--irc", host, "--irc-plaintext", *words, **environ).tls)
            for host in ("irc.test", "192.0.2.1", "127.0.0.1.irc.test", "[2001:db8::1]"):
                with self.subTest(host, words=words):
                    with self.assertRaisesRegex(fingerd.StartError, "log-in"):
                        self.read("--irc", host, "--irc-plaintext", *words, **environ)
                    self.assertTrue(self.read("--irc", host, *words, **environ).tls)
            self.assertFalse(self.read("--irc", "irc.test", "--irc-plaintext").tls)

    def test_what_is_refused(self) -> None:
        for words, problem in [
            (["--irc-channel", "a"], "channel"),
            (["--irc-channel", "#a,b"], "channel"),
            (["--irc-channel", "#a k,l"], "channel"),
            (["--irc-channel", "#a k l"], "channel"),
            (["--irc-channel", "#a "], "channel"),
            (["--irc-certificate", "b", "--irc-plaintext"], "TLS"),
            (["--irc-account", "b", "--irc-plaintext"], "TLS"),
            (["--irc-fingerprint", "ab" * 32, "--irc-plaintext"], "TLS"),
            (["--irc-password-file", "/nonexistent"], "No such file or directory: '/nonexistent'"),
        ]:
            problems = (fingerd.StartError, OSError)  # each is one line at the start
            with self.subTest(words), self.assertRaisesRegex(problems, problem):
                self.read(*words)
        for address in ("a:b", "a:65536", "::1"):
            status, _, errors = run(command("/dev/null", "--irc", address))
            self.assertEqual(status, 2)
            self.assertIn(f"argument --irc: invalid irc_server value: '{address}'", errors[-1])


# ---- the bot against a server that misbehaves --------------------------------------------------


class FakeServerCase(IrcCase):
    def setUp(self) -> None:
        super().setUp()
        self.server = self.keep(socket.create_server(("127.0.0.1", 0)))
        self.server.settimeout(DEADLINE)
        self.port = self.server.getsockname()[1]

    def accept(self, context: Any = None) -> IrcEnd:
        """The bot's next connection, with TLS if there is a context for it."""
        sock, _ = self.server.accept()
        if context:
            sock.settimeout(DEADLINE)
            sock = context.wrap_socket(sock, server_side=True)
        end: IrcEnd = self.keep(IrcEnd(sock))
        return end


class FakeServerTest(FakeServerCase):
    def test_it_answers_and_says_goodbye(self) -> None:
        bot = self.start_bot(self.port)
        end = self.accept().register()
        end.say(":ann!b@c PRIVMSG fingerbot :moshez")
        self.assertEqual(end.hear("PRIVMSG"), "PRIVMSG ann :moshez: Happy and well")
        bot.stopping.set()
        end.hear("QUIT")
        end.close()

    def test_lines_may_come_in_any_pieces(self) -> None:
        self.start_bot(self.port)
        end = self.accept().register()
        end.hear("CAP REQ message-tags")
        for byte in "PING :é\r\nPING b\n\r\n:ann!b@c PRIVMSG fingerbot :moshez\r\n".encode():
            end.sock.send(bytes([byte]))
        self.assertEqual({end.hear(), end.hear()}, {"PONG é", "PONG b"})  # the later may overtake
        self.assertEqual(end.hear(), "PRIVMSG ann :moshez: Happy and well")

    def test_garbage_and_floods_are_survived(self) -> None:
        self.start_bot(self.port)
        end = self.accept().register()
        end.sock.sendall(bytes(range(256)) * 4000 + b"\n" * 10_000)
        end.sock.sendall(b"@" + b"x" * 1_000_000 + b"\r\n")
        end.sock.sendall(b":a!b@c PRIVMSG fingerbot :moshez\r\n" * 20_000 + b"PING end\r\n")
        end.hear("PONG end")

    def test_it_comes_back(self) -> None:
        self.start_bot(self.port)
        self.accept().close()
        self.logged("IRC: ")
        self.accept().say("ERROR :go away")
        self.logged("IRC: the server says: ERROR go away; next attempt in 0 s")
        end = self.accept().register()
        end.hear("CAP REQ message-tags")  # an end that has not read all resets the connection
        end.close()
        self.logged("IRC: the server closed the connection")
        self.accept().register()
        self.logged("registered as fingerbot", 2)

    def test_a_fault_of_ours_does_not_end_it(self) -> None:
        with mock.patch.object(fingerd.IrcSession, "tick", side_effect=KeyError("oops")):
            self.start_bot(self.port)
            self.accept()
            self.assertIn("Traceback", self.logged("IRC: 'oops'; next attempt"))
        self.accept().register()
        self.logged("registered as fingerbot")

    def test_it_notices_silence(self) -> None:
        self.patch(IRC_KEEP_ALIVE_SECONDS=0.1)
        self.start_bot(self.port)
        end = self.accept().register()
        end.hear("CAP REQ message-tags")
        self.assertEqual(next(end.file), b"PING fingerd\r\n")
        self.logged("no longer replies")
        self.accept()

    def test_it_notices_a_server_that_does_not_register_it(self) -> None:
        self.patch(IRC_KEEP_ALIVE_SECONDS=0.1)
        self.start_bot(self.port)
        self.accept().hear("USER")
        self.logged("IRC: the server does not register us")

    def test_it_keeps_its_membership(self) -> None:
        self.patch(IRC_KEEP_ALIVE_SECONDS=0.5)
        self.start_bot(self.port, channels=("#a sesame",))
        end = self.accept().register()
        for lines in [
            [":irc.test 475 fingerbot #a :Wrong key sesame"],
            [":fingerbot!a@b JOIN #a", ":fingerbot!a@b PART #a :bye"],
            [":fingerbot!a@b JOIN #a", ":ann!b@c KICK #a fingerbot :sesame"],
        ]:
            end.hear("JOIN #a sesame")
            end.say(*lines)
        self.logged("KICK #a fingerbot ***")
        end.say(":ann!b@c INVITE fingerbot #a")
        end.hear("JOIN #a sesame")
        end.say(":fingerbot!a@b JOIN #a")
        self.logged("joined #a", 3)
        self.assertNotIn("sesame", "\n".join(self.log))

    def failures(self, last: str) -> list[int]:
        """The count of failures after each of four connections; each hears `last`."""
        delay = mock.Mock(return_value=0.0)
        self.patch(IRC_KEEP_ALIVE_SECONDS=0.1, reconnect_delay=delay)
        self.start_bot(self.port)
        for number in range(1, 5):
            end = self.accept()
            if number > 2:
                end.register().hear(last)
            end.close()
            self.logged("next attempt", number)
        return [call[0][0] for call in delay.call_args_list][:4]

    def test_failures_count_while_no_connection_lasts(self) -> None:
        self.assertEqual(self.failures("CAP REQ message-tags"), [1, 2, 3, 4])

    def test_failures_are_forgotten_when_a_connection_lasts(self) -> None:
        self.assertEqual(self.failures("PING"), [1, 2, 0, 0])

    def test_refused_log_ins_are_failures(self) -> None:
        delay = mock.Mock(return_value=0.0)
        self.patch(reconnect_delay=delay)
        self.start_bot(self.port)
        for numeric in ("464", "465", "904"):
            end = self.accept()
            end.hear("USER")
            end.say(f":irc.test {numeric} * :No")
            self.logged(f"IRC: the server says: {numeric} * No; next attempt")
        self.assertEqual([call[0][0] for call in delay.call_args_list][:3], [1, 2, 3])

    def test_a_refused_log_in(self) -> None:
        self.start_bot(self.port, account="finger", password="secret")
        end = self.accept()
        for heard, said in [
            ("USER", "CAP * ACK :sasl"),
            ("AUTHENTICATE PLAIN", "AUTHENTICATE +"),
            ("AUTHENTICATE ", ":s 904 * :No secret"),
        ]:
            end.hear(heard)
            end.say(said)
        self.logged("IRC: the server says: 904 * No ***; next attempt in 0 s")

    def test_it_leaves_nothing_behind(self) -> None:
        self.patch(IRC_RETRY_SECONDS=0.0)
        self.start_bot(self.port)
        for number in range(1000):
            end = self.accept()
            if number == 10:
                before = self.count_open()
            if number % 2:
                end.register()
            end.close()
        self.accept()
        self.assertLessEqual(self.count_open(), before + 3)

    def count_open(self) -> int:
        return len(os.listdir("/proc/self/fd")) + threading.active_count()

    def test_the_service_stops_while_the_bot_connects(self) -> None:
        # Once the queue of a server that accepts nobody is full, connecting takes 15 s.
        with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
            port = full.getsockname()[1]
            self.keep(connect(port))
            service = self.launch(USERS, "--irc", f"127.0.0.1:{port}")
            started = time.monotonic()
            self.assertEqual(service.stop(), 0)
            self.assertLess(time.monotonic() - started, 10)

    def test_it_stops_while_it_waits(self) -> None:
        self.patch(IRC_RETRY_SECONDS=600.0, IRC_LONGEST_RETRY_SECONDS=600.0)
        bot = self.start_bot(free_port())
        self.logged("Connection refused; next attempt")
        self.stop_bot(bot)

    def test_every_address_of_a_name_is_tried(self) -> None:
        there = socket.getaddrinfo("127.0.0.1", self.port, type=socket.SOCK_STREAM)
        nobody_there = socket.getaddrinfo("127.0.0.2", self.port, type=socket.SOCK_STREAM)
        with mock.patch.object(socket, "getaddrinfo", return_value=nobody_there + there):
            self.start_bot(self.port, host="irc.test")
            self.accept().register()
            self.logged("registered")

    def test_names_that_do_not_exist(self) -> None:
        for count, host in enumerate(("does-not-exist.invalid", "a..b", "x" * 70), 1):
            self.start_bot(6667, host=host)
            self.logged("next attempt", count)


@unittest.skipUnless(shutil.which("openssl"), "openssl makes the certificate")
class TlsTest(FakeServerCase):
    @classmethod
    def setUpClass(cls) -> None:
        import ssl

        folder = new_folder()
        cls.addClassCleanup(shutil.rmtree, folder)
        cls.certificate, cls.fingerprint = make_certificate(folder)
        cls.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        cls.context.load_cert_chain(cls.certificate)
        cls.context.load_verify_locations(cls.certificate)
        cls.context.verify_mode = ssl.CERT_OPTIONAL

    def try_once(self) -> None:
        """Let bots wait after a failure: the next handshake, which nobody answers, takes 15 s."""
        self.patch(IRC_RETRY_SECONDS=DEADLINE, IRC_LONGEST_RETRY_SECONDS=DEADLINE)

    def shown(self) -> str:
        """The SHA-256 of the certificate that the bot shows at its next connection."""
        end = self.accept(self.context)
        return hashlib.sha256(end.sock.getpeercert(binary_form=True) or b"").hexdigest()

    def serve_one(self) -> None:
        end = self.accept(self.context).register()
        end.say(":ann!b@c PRIVMSG fingerbot :moshez")
        end.hear("PRIVMSG ann :moshez: Happy and well")
        end.sock.sendall(b"x" * 50_000 + b"\nPING end\n")
        end.hear("PONG end")

    def test_a_certificate_is_trusted_by_its_digest(self) -> None:
        self.start_bot(self.port, tls=True, fingerprint=self.fingerprint)
        self.serve_one()

    def test_a_certificate_is_trusted_by_its_authority(self) -> None:
        with mock.patch.dict(os.environ, SSL_CERT_FILE=str(self.certificate)):
            self.start_bot(self.port, tls=True, host="localhost")
        self.serve_one()

    def test_it_shows_its_own_certificate(self) -> None:
        tls = {"tls": True, "fingerprint": self.fingerprint}
        self.start_bot(self.port, certificate=str(self.certificate), **tls)
        self.assertEqual(self.shown(), self.fingerprint)

    @unittest.skipUnless(ROOT, "only root has privileges to drop")
    def test_its_own_certificate_is_read_before_privileges_are_dropped(self) -> None:
        secret = self.folder() / "secret.pem"
        shutil.copy(self.certificate, secret)
        secret.chmod(0o600)
        certificate = ["--irc-certificate", str(secret), "--irc-fingerprint", self.fingerprint]
        service = self.launch(USERS, "--irc", f"127.0.0.1:{self.port}", *certificate, run_as="")
        self.assertEqual(self.shown(), self.fingerprint)
        self.assertEqual(service.proc("Uid"), ["1"] * 4)

    def test_own_certificates_that_cannot_be_read(self) -> None:
        folder, pem = self.folder(), self.certificate.read_text()
        (folder / "no-key").write_text(pem[pem.index("-----BEGIN CERT") :])
        (folder / "no-certificate").write_text(pem[: pem.index("-----BEGIN CERT")])
        openssl(f"ec -in {self.certificate} -out {folder}/locked -aes128 -passout pass:secret")
        with (folder / "locked").open("a") as file:
            file.write(pem[pem.index("-----BEGIN CERT") :])
        (folder / "empty").write_text("")
        for name in ("no-key", "no-certificate", "locked", "empty", "missing"):
            words = ["--irc", "127.0.0.1", "--irc-certificate", str(folder / name)]
            with self.subTest(name):
                self.refuses_to_start(command("/dev/null", *words), "--irc-certificate: not a PEM")

    def test_other_certificates_are_refused(self) -> None:
        self.try_once()
        digest = f"the SHA-256 of the server's certificate is {self.fingerprint}"
        for options, problem in [
            ({}, "certificate verify failed: self"),
            ({"host": "127.0.0.1"}, "certificate verify failed: IP address mismatch"),
            ({"fingerprint": "ab" * 32}, digest),
        ]:
            trusted = str(self.certificate) if "host" in options else ""
            with self.subTest(problem), mock.patch.dict(os.environ, SSL_CERT_FILE=trusted):
                bot = self.start_bot(self.port, tls=True, **{"host": "localhost", **options})
                with contextlib.suppress(OSError):
                    self.accept(self.context)
                self.logged(problem)
                self.stop_bot(bot)

    def test_a_server_without_tls_is_recognised(self) -> None:
        self.try_once()
        for count, lines in enumerate([[":irc.test NOTICE * :Looking up your hostname"], []], 1):
            bot = self.start_bot(self.port, tls=True)
            end = self.accept()
            end.say(*lines)
            end.close()
            self.logged("--irc-plaintext", count)
            self.stop_bot(bot)

    def test_the_service_stops_in_the_middle_of_a_handshake(self) -> None:
        service = self.launch(USERS, "--irc", f"127.0.0.1:{self.port}")
        self.accept().sock.recv(1)
        started = time.monotonic()
        self.assertEqual(service.stop(), 0)
        self.assertLess(time.monotonic() - started, 10)

    def test_a_handshake_takes_no_longer_than_it_may(self) -> None:
        self.patch(IRC_CONNECT_SECONDS=0.1)
        self.start_bot(self.port, tls=True)
        self.accept()
        self.logged("TLS: ")


# ---- the bot on real servers -------------------------------------------------------------------


class RealServerCase(IrcCase):
    """The same tests for each server, which speaks plain and TLS."""

    command = ""  # its last word is the configuration file
    configuration = ""

    @classmethod
    def setUpClass(cls) -> None:
        program = cls.command.split()[0]
        if not shutil.which(program, path=PATH) or not shutil.which("openssl"):
            raise unittest.SkipTest(f"without {program} and openssl")
        cls.path = new_folder()
        cls.addClassCleanup(shutil.rmtree, cls.path)
        cls.port, cls.tls_port = free_port(), free_port()
        cls.certificate, cls.fingerprint = make_certificate(cls.path)
        cls.start_server()
        cls.addClassCleanup(cls.end_server)

    @classmethod
    def start_server(cls) -> None:
        """Start the server, not as root, and wait until it accepts connections."""
        values = {"port": cls.port, "tls_port": cls.tls_port, "certificate": cls.certificate}
        (cls.path / "ircd.conf").write_text(cls.configuration.format(**values))
        cls.server = subprocess.Popen(
            cls.command.format(path=cls.path).split(),
            env={**os.environ, "PATH": PATH},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=become_nobody if ROOT else None,
        )
        until(lambda: not refused(cls.port) and not refused(cls.tls_port), cls.command)

    @classmethod
    def end_server(cls) -> None:
        cls.server.kill()
        cls.server.wait()

    def person(self, nick: str = "ann") -> IrcEnd:
        """A person who is registered with the server."""
        end: IrcEnd = self.keep(IrcEnd(connect(self.port)))
        end.say(f"NICK {nick}", "USER ann 0 * :Ann")
        end.hear(" 001 ")
        return end

    def operator(self, *channels: str) -> IrcEnd:
        """A person who is an operator of the server and of channels, each `#NAME MODES`."""
        end = self.person("root")
        end.say("OPER root root")
        end.hear(" 381 ")
        for channel in channels:
            end.say(f"JOIN {channel.partition(' ')[0]}", f"MODE {channel}")
            end.hear(" 366 ")
        return end

    def test_it_answers_over_tls_in_private_and_in_a_channel(self) -> None:
        tls = {"tls": True, "fingerprint": self.fingerprint}
        self.start_bot(self.tls_port, channels=("#office",), **tls)
        self.logged("joined")
        ann = self.person()
        for said, heard in [
            ("JOIN #office", " 366 "),
            ("PRIVMSG fingerbot moshez", "PRIVMSG ann :moshez: Happy and well"),
            ("PRIVMSG #office :!finger nobody", "PRIVMSG #office :nobody: No such user"),
        ]:
            ann.say(said)
            ann.hear(heard)
        ann.say("PRIVMSG fingerbot long")
        received = f"{ann.hear('PRIVMSG ann :long: ')}\r\n"
        self.assertRegex(received, ":long: é{150,}\r\n$")
        self.store.set("moshez", "Giving a tutorial now, sorry!")
        ann.hear("PRIVMSG #office :moshez: Giving a tutorial now, sorry!")

    def test_tls_where_there_is_none(self) -> None:
        self.patch(IRC_CONNECT_SECONDS=0.1)
        self.start_bot(self.port, tls=True)
        self.logged("--irc-plaintext")

    def test_a_taken_nick_is_regained(self) -> None:
        holder = self.person("fingerbot")
        self.patch(IRC_KEEP_ALIVE_SECONDS=2.0)
        self.start_bot(self.port, channels=("#lobby",))
        self.logged("registered as fingerbo_")
        self.logged("joined")
        holder.say("JOIN #lobby")
        holder.hear(" 366 ")
        holder.say("NICK away")
        holder.hear("NICK :fingerbot")
        holder.say("PRIVMSG fingerbot moshez")
        holder.hear(":fingerbot!")

    def test_it_returns_to_a_server_that_was_killed(self) -> None:
        self.start_bot(self.port)
        self.logged("registered")
        self.end_server()
        self.logged("Connection refused")
        self.start_server()
        self.logged("registered", 2)

    def test_it_leaves_a_server_that_stands_still(self) -> None:
        self.patch(IRC_KEEP_ALIVE_SECONDS=2.0)
        self.start_bot(self.port)
        self.logged("registered")
        self.server.send_signal(signal.SIGSTOP)
        self.logged("no longer replies")
        self.server.send_signal(signal.SIGCONT)
        self.logged("registered", 2)


class NgircdTest(RealServerCase):
    command = "ngircd -n -f {path}/ircd.conf"
    configuration = """
        [Global]
        Name = irc.test
        AdminInfo1 = test
        Listen = 127.0.0.1
        MotdPhrase = hello
        Ports = {port}
        [Options]
        IncludeDir = /nonexistent
        DNS = no
        Ident = no
        PAM = no
        [Limits]
        MaxConnectionsIP = 0
        MaxPenaltyTime = 0
        [Channel]
        Name = #locked
        Modes = +tnk sesame
        [SSL]
        CertFile = {certificate}
        KeyFile = {certificate}
        Ports = {tls_port}
    """

    def test_two_bots_do_not_talk_to_each_other(self) -> None:
        self.store = make_store({"one": "three", "two": "one"})
        for count, nick in enumerate(["one", "two"], 1):
            self.start_bot(self.port, nick=nick, channels=("#bots",))
            self.logged("joined #bots", count)
        ann = self.person()
        ann.say("JOIN #bots")
        ann.hear(" 366 ")
        heard = []
        for said, reply in [
            ("#bots :one: two", ":one!~fingerd@127.0.0.1 PRIVMSG #bots :two: one"),
            ("one :two", ":one!~fingerd@127.0.0.1 PRIVMSG ann :two: one"),
            ("two :two", ":two!~fingerd@127.0.0.1 PRIVMSG ann :two: one"),
            ("#bots :!finger nobody", "PRIVMSG #bots :nobody: No such user"),
        ]:
            ann.say(f"PRIVMSG {said}")
            while not heard or reply not in heard[-1]:
                heard.append(ann.hear())
        self.assertEqual(len(heard), 4, heard)

    def test_keys(self) -> None:
        self.start_bot(self.port, channels=("#open", "#locked sesame"))
        self.logged("joined #locked")
        self.logged("joined #open")
        self.start_bot(self.port, nick="wrong", channels=("#open", "#locked closed"))
        self.logged("#locked refuses us (475)")
        self.logged("joined #open", 2)
        self.assertNotRegex("\n".join(self.log), "sesame|closed")


class InspircdTest(RealServerCase):
    command = "inspircd --nofork --nolog --nopid --config {path}/ircd.conf"
    configuration = """
        <server name="irc.test" description="test" network="Test" id="0AA">
        <admin name="test" nick="test" email="test@irc.test">
        <bind address="127.0.0.1" port="{port}" type="clients">
        <bind address="127.0.0.1" port="{tls_port}" type="clients" sslprofile="tls">
        <module name="cap">
        <module name="ircv3_ctctags">
        <module name="botmode">
        <module name="cban">
        <module name="joinflood">
        <joinflood bootwait="0">
        <module name="operchans">
        <module name="redirect">
        <module name="remove">
        <module name="sapart">
        <module name="ssl_gnutls">
        <module name="sslinfo">
        <sslprofile name="tls" provider="gnutls" certfile="{certificate}" keyfile="{certificate}">
        <connect allow="*" resolvehostnames="no" localmax="50" globalmax="50" fakelag="no">
        <class name="all" commands="*" privs="*" chanmodes="*" usermodes="*" snomasks="*">
        <type name="root" classes="all">
        <oper name="root" password="root" host="*@*" type="root">
    """

    def test_refusals(self) -> None:
        root = self.operator(
            "#full +lL 1 #other", "#other", "#opers +O", "#quiet +m", "#flood +j 2:9"
        )
        root.say("CBAN #banned 1h :reserved")
        joiner = self.person("joiner")
        for _ in range(3):
            joiner.say("JOIN #flood", "PART #flood")
        joiner.hear(" 437 ")
        channels = ("#full", "#opers", "#quiet", "#flood", "#banned")
        self.start_bot(self.port, channels=channels)
        self.logged("joined #quiet")
        for refusal in (
            "#full refuses us (470)",
            "#opers refuses us (520)",
            "#flood refuses us (437)",
        ):
            self.logged(refusal)
        self.logged("#banned refuses us (926)")
        self.assertIn("#other", self.logged("#full refuses us (470)"))
        root.hear(" PART :#other")
        self.store.set("moshez", "Giving a tutorial now, sorry!")
        self.logged("#quiet refuses us (404)")

    def test_out_of_a_channel(self) -> None:
        root = self.operator("#office +n")
        self.patch(IRC_KEEP_ALIVE_SECONDS=2.0)
        self.start_bot(self.port, channels=("#office",))
        self.logged("joined #office")
        for count, words in enumerate(
            ["SAPART fingerbot #office", "REMOVE fingerbot #office :x"], 1
        ):
            root.say(words)
            self.logged(" PART #office", count)
            self.logged("joined #office", count + 1)
        root.say("KICK #office fingerbot :out", "MODE #office +i")
        self.logged("KICK #office fingerbot out")
        root.say("INVITE fingerbot #office")
        self.logged("joined #office", 4)

    def test_it_shows_its_certificate(self) -> None:
        tls = {"tls": True, "fingerprint": self.fingerprint, "certificate": str(self.certificate)}
        self.start_bot(self.tls_port, **tls)
        self.logged("registered")
        root = self.operator()
        root.say("WHOIS fingerbot")
        self.assertIn("fingerprint", root.hear(" 276 "))


class HybridTest(RealServerCase):
    command = """
        ircd-hybrid -foreground -configfile {path}/ircd.conf
        -logfile /dev/null -pidfile /dev/null -klinefile /dev/null -dlinefile /dev/null
        -xlinefile /dev/null -resvfile /dev/null
    """
    configuration = """
        serverinfo {{
            name = "irc.test"; description = "test";
            tls_certificate_file = "{certificate}"; rsa_private_key_file = "{certificate}";
        }};
        admin {{ name = "test"; description = "test"; email = "test@irc.test"; }};
        class {{ name = "all"; number_per_ip_local = 50; number_per_ip_global = 50;
                 max_number = 50; recvq = 8000 bytes; sendq = 1 megabyte; ping_time = 2 minutes; }};
        listen {{ host = "127.0.0.1"; port = {port}; flags = tls; port = {tls_port}; }};
        auth {{ user = "*@*"; class = "all"; flags = can_flood; }};
        operator {{
            name = "root"; user = "*@*"; class = "all"; password = "root"; encrypted = no;
        }};
        resv {{ mask = "#reserved"; reason = "reserved"; }};
        general {{ throttle_count = 1000; disable_auth = yes; }};
    """

    def test_refusals(self) -> None:
        self.operator("#opers +O", "#registered +R", "#quiet +m")
        channels = ("#opers", "#registered", "#quiet", "#reserved")
        self.start_bot(self.port, channels=channels)
        self.logged("joined #quiet")
        self.logged("#opers refuses us (520)")
        self.logged("#registered refuses us (477)")
        self.logged("#reserved refuses us (485)")
        self.store.set("moshez", "Giving a tutorial now, sorry!")
        self.logged("#quiet refuses us (404)")


@unittest.skipUnless(shutil.which("znc", path=PATH), "without znc")
class ZncTest(FakeServerCase):
    """A bouncer between the bot and a server."""

    configuration = """
        Version = 1.8.0
        <Listener bots>
            Host = 127.0.0.1
            Port = {port}
            IPv4 = true
            IPv6 = false
            SSL = false
        </Listener>
        <User bot>
            Pass = plain#secret
            <Network test>
                Server = 127.0.0.1 {server}
            </Network>
        </User>
    """

    def test_neither_the_bouncer_nor_its_playback_is_answered(self) -> None:
        self.patch(IRC_KEEP_ALIVE_SECONDS=0.5)
        session = fingerd.IrcSession
        saying = mock.patch.object(session, "say", autospec=True, side_effect=session.say)
        said = saying.start()
        self.addCleanup(saying.stop)
        port, folder = free_port(), self.folder()
        (folder / "configs").mkdir()
        file = folder / "configs/znc.conf"
        file.write_text(self.configuration.format(port=port, server=self.port))
        for path in (folder, folder / "configs", file):
            path.chmod(0o777)
        znc = subprocess.Popen(
            ["znc", "--foreground", "--datadir", str(folder)],
            env={**os.environ, "PATH": PATH},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=become_nobody if ROOT else None,
        )
        self.addCleanup(znc.wait)
        self.addCleanup(znc.kill)
        until(lambda: not refused(port), "znc")
        bot = self.start_bot(port, password="bot/test:secret", channels=("#a",))
        self.logged("registered")  # with ZNC, whose *status says that there is no server yet
        end = self.accept().register()
        end.hear("JOIN #a")
        end.say(":fingerbot!x@y JOIN #a", ":fingerbot!x@y JOIN ##theirs")
        self.logged("joined #a")
        self.stop_bot(bot)
        end.say(":ann!b@c PRIVMSG fingerbot :shawn", ":ann!b@c PRIVMSG #a :fingerbot: shawn")
        end.say("PING played")
        end.hear("PONG")
        self.start_bot(port, password="bot/test:secret", channels=("#a",))
        self.logged("joined #a", 2)
        end.say(":ann!b@c PRIVMSG #a :!finger moshez")
        heard = [end.hear()]
        while "PRIVMSG" not in heard[-1]:
            heard.append(end.hear())
        self.assertEqual(heard[-1], "PRIVMSG #a :moshez: Happy and well")
        self.assertFalse([line for line in heard if "PART" in line])  # it is not the bot's channel
        said.assert_called_once_with(mock.ANY, "#a", "moshez: Happy and well")


del FakeServerCase, RealServerCase  # the tests are in the classes made of them


# ================================================================================================
# 10. faults: nothing lost, nobody let in, a clean stop
# ================================================================================================

CROWDED = {f"u{n:05}": "x" * 1_000 for n in range(9_000)}  # more than the kernel buffers


def become_nobody() -> None:
    """In a child process: stop being root."""
    os.setgroups([])
    os.setgid(1)
    os.setuid(1)


def python_for_everybody() -> str:
    """An interpreter that is not out of reach for nobody."""
    for python in (sys.executable, "/usr/bin/python3"):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run([python, "-c", ""], check=True, preexec_fn=become_nobody, timeout=9)
            return python
    raise unittest.SkipTest("no Python that somebody else could run")


class DurabilityTest(Case):
    def test_kill_keeps_what_was_acknowledged(self) -> None:
        service, chance, numbers = self.launch(), random.Random(SEED), itertools.count()
        possible: dict[str, set[str]] = {}  # the text of the last OK, and what came after it

        def client(port: int, me: int, acknowledged: list[int]) -> None:
            for number in numbers:
                user, text = f"u{me}-{number % 7}", f"n{number}"
                possible.setdefault(user, {"No such user"}).add(text)
                answer = b""
                with contextlib.suppress(OSError):
                    answer = ask(port, f"{user}\n{text}\n".encode())
                if not answer:
                    return
                self.assertEqual(answer, b"OK\r\n")
                possible[user] = {text}
                acknowledged.append(number)

        for _ in range(KILLS):
            port, acknowledged = service.port("setter"), []
            with ThreadPoolExecutor(8) as pool:
                clients = [pool.submit(client, port, me, acknowledged) for me in range(8)]
                wanted = chance.randint(20, 120)
                try:
                    until(lambda a=acknowledged, w=wanted: len(a) >= w)  # type: ignore[misc]
                finally:
                    service.kill()
                for future in clients:
                    future.result()
            service.start()
            for user, texts in possible.items():
                shown = service.finger(user).rstrip("\r\n")
                self.assertIn(shown, texts, user)
                possible[user] = {shown}

    def test_setters_that_wait_share_a_commit(self) -> None:
        store, sizes = make_store({}, fingerd.StateFile(self.folder() / "state.db")), []
        self.addCleanup(store._state.close)
        write = fingerd.StateFile.write

        def slow_write(state: Any, new: Any, *users: Any) -> None:
            if not sizes:  # the disk is slow until all others wait
                until(lambda: len(new.messages) + len(store._orders) == 64)
            sizes.append(len(new.messages) - sum(sizes))
            write(state, new, *users)

        with mock.patch.object(fingerd.StateFile, "write", slow_write):
            in_parallel(64, lambda number: store.set(f"u{number}", "text"))
        self.assertEqual((len(sizes), sum(sizes)), (2, 64))
        self.assertEqual(len(texts_of(store)), 64)

    def tmpfs(self) -> pathlib.Path:
        """A small file system of its own."""
        folder = self.folder()
        mount = ["mount", "-t", "tmpfs", "-o", "size=256k,mode=755", "tmpfs", str(folder)]
        if not ROOT or run(mount)[0]:
            self.skipTest("cannot mount here")
        self.addCleanup(subprocess.run, ["umount", "-l", str(folder)], check=True)
        return folder

    def out_of_room(self, service: Service, make_room: Callable[[], None]) -> None:
        """Checks a service whose disk is nearly full, and has kept that shawn is `first`."""
        kept, errors = {}, 0
        for n in range(400):
            answer = service.set(f"u{n}", "x" * 900)
            if answer == "OK\r\n":
                kept[f"u{n}"] = "x" * 900
            else:
                self.assertRegex(answer, r"\AERROR could not be kept.*\r\n\Z")
                self.assertEqual(service.finger(f"u{n}"), "No such user\r\n")
                errors += 1
            if errors > 20:
                break
        self.assertRegex(service.set("shawn", "y" * 900), "^ERROR could not be kept")
        self.assertEqual(service.finger("shawn"), "first\r\n")
        service.wait_for(" ERROR the state file: could not be kept")
        make_room()
        self.assertEqual(service.set("shawn", "second"), "OK\r\n")
        service.kill()
        service.start()
        listing = dict(line.split(": ") for line in service.finger("").splitlines())
        self.assertEqual(listing, {"moshez": "Happy and well", "shawn": "second", **kept})

    def test_file_size_limit(self) -> None:
        def limit(pid: int, size: int) -> None:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

        service = self.launch(preexec_fn=lambda: limit(0, 100_000))
        self.assertEqual(service.set("shawn", "first"), "OK\r\n")
        del service.popen["preexec_fn"]
        self.out_of_room(service, lambda: limit(service.pid, resource.RLIM_INFINITY))

    def test_full_disk(self) -> None:
        disk = self.tmpfs()
        service = self.launch(USERS, "--state", str(disk / "state.db"))
        self.assertEqual(service.set("shawn", "first"), "OK\r\n")
        with contextlib.suppress(OSError), (disk / "filler").open("wb", 0) as file:
            while True:
                file.write(bytes(1024))
        self.out_of_room(service, (disk / "filler").unlink)

    def test_a_state_file_that_cannot_be_used_is_left_alone(self) -> None:
        folder, running = self.folder(), self.launch()
        noise = bytes(random.Random(SEED).choices(range(256), k=10_000))
        (folder / "noise").write_bytes(noise)
        (folder / "text").write_text("a text that is no database at all\n" * 99)
        (folder / "folder").mkdir()
        for name in ("corrupt", "newer"):
            state = fingerd.StateFile(folder / name)
            message = fingerd.Message("x" * 500, 1.0, None, "")
            messages = dict.fromkeys((f"u{n}" for n in range(200)), message)
            state.write(fingerd.Snapshot(messages=messages))
            state.close()
        shutil.copy(folder / "corrupt", folder / "cut")
        os.truncate(folder / "cut", 5_000)
        with (folder / "corrupt").open("r+b") as file:
            file.seek(8_192)
            file.write(b"\xa5" * 40_000)
        for name, statement in {
            "newer": "PRAGMA user_version = 9",
            "other": "PRAGMA application_id = 77",
            "foreign": "CREATE TABLE precious (x)",
            "locked": "CREATE TABLE precious (x)",
        }.items():
            db = self.keep(sqlite3.connect(folder / name, isolation_level=None))
            db.execute(statement)
        db.execute("BEGIN EXCLUSIVE")
        names = ("noise", "text", "folder", "corrupt", "cut", "none/x", "locked")
        problems = {folder / name: "" for name in names}
        problems[folder / "newer"] = "newer"
        problems[folder / "other"] = problems[folder / "foreign"] = "not a fingerd state file"
        problems[running.state] = "another fingerd"
        with contextlib.suppress(unittest.SkipTest):
            disk = self.tmpfs()
            fingerd.StateFile(disk / "read-only").close()
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            problems[disk / "read-only"] = ""
        others = [folder / name for name in ("noise", "text", "other", "foreign")]
        before = [path.read_bytes() for path in others]
        for path, words in problems.items():
            with self.subTest(path.name), self.assertRaisesRegex(fingerd.NotKept, words) as caught:
                fingerd.StateFile(path)
            self.assertIn(str(path), str(caught.exception))
        for path in (running.state, folder / "corrupt", folder / "locked"):
            with self.subTest(path.name, start=True):
                words = command(running.users, state=path)
                self.refuses_to_start(words, f"{path}.*{problems[path]}")
        self.assertEqual(running.set("shawn", "still here"), "OK\r\n")
        self.assertEqual([path.read_bytes() for path in others], before)

    def test_a_state_file_that_is_lost_while_in_use_is_written_anew(self) -> None:
        def remove(path: pathlib.Path) -> None:
            for file in path.parent.glob(path.name + "*"):
                file.unlink()

        def replace(path: pathlib.Path) -> None:
            state = fingerd.StateFile(path.with_name("other"))
            message = fingerd.Message("other", 1.0, None, "")
            state.write(fingerd.Snapshot(messages={"shawn": message}))
            state.close()
            os.replace(path.with_name("other"), path)

        for title, how in {
            "removed with its log": remove,
            "removed": pathlib.Path.unlink,
            "replaced": replace,
            "cut": lambda path: os.truncate(path, 0),
        }.items():
            with self.subTest(title):
                service = self.launch()
                for user in ("shawn", "gone"):
                    self.assertEqual(service.set(user, "first"), "OK\r\n")
                how(service.state)
                self.assertEqual(service.set("zed", "second"), "OK\r\n")
                service.wait_for("WARNING .*state.db: another program changed it")
                self.assertEqual(service.set("gone", ""), "OK\r\n")
                service.kill()
                service.start()
                wanted = "moshez: Happy and well\r\nshawn: first\r\nzed: second\r\n"
                self.assertEqual(service.finger(""), wanted)

    def test_a_foreign_file_in_the_place_of_the_state_is_left_alone(self) -> None:
        service = self.launch()
        service.set("shawn", "first")
        put(service.state, "not a database" * 999)
        for _ in range(2):
            self.assertRegex(service.set("shawn", "second"), "^ERROR could not be kept")
        self.assertEqual(service.state.read_text(), "not a database" * 999)
        service.state.unlink()
        self.assertEqual(service.set("zed", "third"), "OK\r\n")
        service.kill()
        service.start()
        self.assertEqual(
            (service.finger("shawn"), service.finger("zed")), ("first\r\n", "third\r\n")
        )

    @needs("strace")
    def test_an_error_of_the_disk_leaves_nothing_behind(self) -> None:
        for calls, text in (
            ("fdatasync,fsync", None),
            ("fdatasync,fsync,unlink", ""),
            ("pwrite64", "second"),
        ):
            with self.subTest(calls, text=text):
                self.refuses_with_faults(self.launch(), calls, text)

    def refuses_with_faults(self, service: Service, calls: str, text: str | None) -> None:
        """Checks that nothing is left of what is refused while these system calls fail."""
        reader = self.keep(sqlite3.connect(service.state, isolation_level=None))
        reader.execute("BEGIN").execute("SELECT * FROM messages").fetchall()
        service.set("shawn", "first")
        words = ["strace", "-f", "-p", str(service.pid), "-o", os.devnull]
        words += ["-e", f"trace={calls}", "-e", f"inject={calls}:error=EIO"]
        kept = ["none"]
        with subprocess.Popen(words, stderr=subprocess.PIPE) as strace:
            assert strace.stderr
            if b"attached" not in strace.stderr.readline():
                self.skipTest("cannot trace here")
            while service.set("zed", f"{len(kept)}") == "OK\r\n":
                kept.append(f"{len(kept)}")
            if text is not None:  # after a failure, too
                self.assertRegex(service.set("shawn", text), "^ERROR could not be kept")
            self.assertEqual(service.finger("shawn"), "first\r\n")
            service.kill()
        for name in ("state.db", "state.db-wal"):  # without -shm, as after a loss of power
            shutil.copy(service.folder / name, service.folder / f"copy-{name}")
        state = fingerd.StateFile(service.folder / "copy-state.db")
        state.close()
        found = {"zed": "none", **{user: row[0] for user, row in state.messages.items()}}
        self.assertEqual(found, {"shawn": "first", "zed": kept[-1]})

    def test_the_default_state_file_is_used_or_ends_the_start(self) -> None:
        folder, users = self.folder() / "state", self.folder() / "users"
        put(users, USERS)
        environment = {**os.environ, "STATE_DIRECTORY": str(folder)}
        words = command(users, state="")
        path = folder / (str(users)[1:].replace("/", "-") + ".db")
        service = self.launch(source=str(users), state="", env=environment)
        self.assertEqual(service.set("shawn", "kept"), "OK\r\n")
        self.assertEqual((path.stat().st_mode, folder.stat().st_mode), (0o100600, 0o40700))
        self.refuses_to_start(words, f"{path}: another fingerd.*stop", env=environment)
        service.stop()
        kept = path.read_bytes()
        for spoil in (
            lambda: path.write_bytes(b"noise" * 999),
            lambda: path.symlink_to(users),
            lambda: path.mkdir(),
        ):
            path.unlink()
            spoil()
            self.refuses_to_start(words, f"{path}: .*move it away.*--state", env=environment)
        self.assertEqual(users.read_text(), USERS)
        path.rmdir()
        path.write_bytes(kept)
        service.start()
        service.wait_for(f"INFO state: {path}, 1 messages$")
        service.wait_for(f"INFO {users}: 2 users, 2 with a status$")
        self.assertEqual(service.finger("shawn"), "kept\r\n")

    def test_where_no_state_file_can_be_had(self) -> None:
        nowhere = {**os.environ, "STATE_DIRECTORY": "/proc/nowhere"}
        code = f"""import sys; sys.path.insert(0, {str(HERE)!r}); sys.modules["sqlite3"] = None
import fingerd; sys.exit(fingerd.main())"""
        without = {**os.environ, "STATE_DIRECTORY": str(self.folder() / "state")}
        for title, env, program in (
            ("no directory", nowhere, PROGRAM),
            ("no sqlite3", without, (sys.executable, "-c", code)),
        ):
            with self.subTest(title):
                service = self.launch(state="", env=env, program=program)
                service.wait_for("WARNING messages will be lost when fingerd ends: ")
                self.assertEqual(service.set("shawn", "set"), "OK until fingerd restarts\r\n")
                self.assertEqual(service.finger("shawn"), "set\r\n")
        self.assertEqual(self.launch(state="off").set("shawn", "set"), "OK\r\n")

    def test_a_failed_start_leaves_nothing_behind(self) -> None:
        folder = self.folder()
        self.refuses_to_start(command("/nowhere/users", state=folder / "state.db"), "/nowhere")
        words = command(HERE / "users.example", "--plans", "/nowhere", state=folder / "state.db")
        self.refuses_to_start(words, "--plans: /nowhere")
        with socket.create_server(("127.0.0.1", 0)) as taken:
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            words = command(HERE / "users.example", "--web", address, state=folder / "state.db")
            self.refuses_to_start(words, "in use")
        self.assertEqual(list(folder.iterdir()), [])

    def test_a_state_directory_that_others_can_write_is_refused(self) -> None:
        outer = self.folder()
        (outer / "inner").mkdir()
        for mode, inner_mode, fine in (
            (0o755, 0o755, True),
            (0o755, 0o777, False),
            (0o755, 0o1777, False),
            (0o777, 0o755, False),
            (0o1777, 0o755, True),
        ):
            outer.chmod(mode)
            (outer / "inner").chmod(inner_mode)
            words = command("/nowhere/users", state=outer / "inner/state.db")
            with self.subTest(oct(mode), inner=oct(inner_mode)):
                self.refuses_to_start(words, "/nowhere" if fine else "others can write.*chmod")
        self.assertEqual(list((outer / "inner").iterdir()), [])

    def test_a_message_is_taken_back_in_time(self) -> None:
        service = self.launch(env={**os.environ, "TZ": "CET-1"})
        answer = service.set("shawn: 14:00", "lunch")
        self.assertRegex(answer, r"^OK until 2\d{3}-\d\d-\d\d 13:00 UTC\r\n$")
        service.stop()
        db = self.keep(sqlite3.connect(service.state, isolation_level=None))
        db.execute("UPDATE messages SET until = ?", (time.time() + 2.5,))
        db.close()
        service.start()
        self.assertEqual(service.finger("shawn"), "lunch\r\n")
        etag = service.get("/").headers["etag"]
        until(lambda: service.finger("shawn") == "alive\r\n")
        self.assertNotEqual(service.get("/").headers["etag"], etag)
        service.kill()
        service.start()
        self.assertEqual(service.finger("shawn"), "alive\r\n")

    def test_state_is_readable_and_lockable_while_in_use(self) -> None:
        service, start = self.launch(), time.time()
        service.set("shawn", "first")
        service.set("shawn", "second")
        copy = shutil.copy(service.state, service.folder / "copy.db")
        db = self.keep(sqlite3.connect(copy))
        row = db.execute("SELECT text FROM messages").fetchone()
        self.assertEqual(row, ("second",), "a plain copy is whole")
        db = self.keep(sqlite3.connect(service.state, isolation_level=None))
        ((*row, since),) = db.execute("SELECT user, text, set_by, since FROM messages").fetchall()
        self.assertEqual(row, ["shawn", "second", ACCOUNT])
        self.assertTrue(start <= since <= time.time())
        self.assertGreaterEqual(db.execute("PRAGMA user_version").fetchone()[0], 1)
        db.execute("BEGIN IMMEDIATE")
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(service.set, "shawn", "third")
            while not answer.done():
                self.assertEqual(service.finger("shawn"), "second\r\n")
        self.assertRegex(answer.result(), "^ERROR could not be kept: database is locked")
        self.assertEqual(service.finger("shawn"), "second\r\n")
        db.execute("ROLLBACK")
        self.assertEqual(service.set("shawn", "third"), "OK\r\n")

    def test_state_does_not_grow(self) -> None:
        path = self.folder() / "state.db"
        log, state = pathlib.Path(f"{path}-wal"), fingerd.StateFile(path)
        for n in range(60):
            message = fingerd.Message(str(n).rjust(1_000), 1.0, None, "")
            state.write(fingerd.Snapshot(messages={f"u{i}": message for i in range(150)}))
        self.assertLess(path.stat().st_size, 1_000_000)
        self.assertFalse(log.exists())

    def test_ceiling_on_messages(self) -> None:
        store = make_store({})
        self.patch(MAX_MESSAGES=3)
        for user in "abc":
            store.set(user, "x")
        with self.assertRaisesRegex(fingerd.NotKept, "more than 3 messages"):
            store.set("d", "x")
        for user, text in (("a", "y"), ("b", ""), ("d", "x")):
            store.set(user, text)
        self.assertEqual(texts_of(store), {"a": "y", "c": "x", "d": "x"})


KOI8_CALL = (
    "<?xml version='1.0' encoding='koi8-r'?><methodCall><methodName>getUser</methodName><params>"
    "<param><value><string>привет</string></value></param></params></methodCall>"
).encode("koi8-r")
FAULTY = """
import sys; sys.path.insert(0, {folder!r}); import fingerd
real = fingerd.finger_answer
def answer(now, query, *rest):
    return None.nothing if query.user == "fault" else real(now, query, *rest)
fingerd.finger_answer = answer
sys.exit(fingerd.main())
"""


@unittest.skipUnless(ROOT, "needs root")
class PrivilegesTest(Case):
    def whom(self, service: Service) -> tuple[set[str], set[str], list[str]]:
        return set(service.proc("Uid")), set(service.proc("Gid")), service.proc("Groups")

    def test_default_is_uid_1_gid_1_without_groups(self) -> None:
        service = self.launch(run_as="", preexec_fn=lambda: os.setgroups([4, 5]))
        self.assertEqual(self.whom(service), ({"1"}, {"1"}, []))
        for capabilities in ("CapPrm", "CapEff", "CapAmb"):  # containers may begin with CapInh
            self.assertEqual(service.proc(capabilities), ["0" * 16])
        for file in service.folder.glob("state*"):
            self.assertEqual((file.name, file.stat().st_uid), (file.name, 1))
        for n in range(30):
            self.assertEqual(service.set(f"u{n}", f"{n}" * 400), "OK\r\n")
        self.assertEqual(service.stop(), 0)
        service.start()
        for n in range(30):
            self.assertEqual(service.finger(f"u{n}"), f"{n}" * 400 + "\r\n")

    def test_run_as(self) -> None:
        me = pwd.getpwuid(1)
        for option, uid, gid in ((me.pw_name, 1, me.pw_gid), ("2:3", 2, 3), ("0:0", 0, 0)):
            with self.subTest(option):
                state = self.folder() / "made" / "for it"
                env = {**os.environ, "STATE_DIRECTORY": str(state)}
                service = self.launch(USERS, "--run-as", option, state="", env=env)
                self.assertEqual(self.whom(service), ({str(uid)}, {str(gid)}, []))
                self.assertEqual(service.set("shawn", "kept"), "OK\r\n")
                owners = [(file.stat().st_uid, file.stat().st_gid) for file in state.glob("**/*")]
                self.assertEqual(set(owners), {(uid, gid)})
                self.assertEqual((state.stat().st_uid, state.parent.stat().st_uid), (uid, 0))
                service.stop()
                service.start()
                self.assertEqual(service.finger("shawn"), "kept\r\n")
        service.stop()
        for uid, gid, mode in ((3, 3, 0o700), (0, 3, 0o770)):
            os.chown(state, uid, gid)
            state.chmod(mode)
            self.refuses_to_start(
                service.command, f"{state}: others can write.*chown|chown", env=env
            )
        for option in ("no-such-user", "1:no-such-group", "99999999999", "1:4294967295"):
            with self.subTest(option):
                self.refuses_to_start(command(service.users, run_as=option), "--run-as")

    def test_root_opens_nothing_in_the_services_directory(self) -> None:
        folder, outside = self.folder(), self.folder()
        outside.chmod(0o700)
        put(outside / "precious", "a file of root's")
        sqlite3.connect(folder / "state.db").execute("CREATE TABLE x (x)").connection.close()
        name, magic = str(outside / "precious").encode(), bytes.fromhex("d9d505f920a163d7")
        head = (magic + struct.pack(">5I", 0, 0, 2, 512, 4_096)).ljust(512, b"\0")
        end = struct.pack(">2I", len(name), sum(name)) + magic
        page = struct.pack(">I", 0x4000_0000 // 4_096 + 1)
        (folder / "state.db-journal").write_bytes(head + page + name + end)  # "delete that file"
        (folder / "state.db-lock").symlink_to(outside / "new")
        for path in (folder, *folder.iterdir()):
            os.chown(path, 1, 1, follow_symlinks=False)
        users = self.folder() / "users"
        put(users, USERS)
        words = command(users, run_as="", state=folder / "state.db")
        self.refuses_to_start(words, "state.db: ")
        (folder / "state.db-lock").unlink()
        self.refuses_to_start(words, "state.db: not a fingerd state file")
        self.assertEqual(os.listdir(outside), ["precious"])

    def test_run_as_needs_root_and_is_not_suggested_without(self) -> None:
        copy = shutil.copy(FINGERD, self.folder())  # nobody may be kept out of where we are
        program = (python_for_everybody(), str(copy))
        words = command("/etc/hosts", "--run-as", "1", program=program)
        self.refuses_to_start(words, "--run-as.*root", preexec_fn=become_nobody)
        users = self.folder() / "users"
        put(users, USERS)
        users.chmod(0)
        words = command(users, run_as="", program=program)
        problem = rf"{users}: Permission denied for {pwd.getpwuid(1).pw_name}$"
        self.refuses_to_start(words, problem, preexec_fn=become_nobody)

    def test_interpreter_out_of_reach_after_the_drop(self) -> None:
        program = self.folder() / "faulty.py"
        program.write_text(FAULTY.format(folder=str(HERE)))
        text, program = "moshez: x\nпривет: мир\n", (sys.executable, str(program))
        service = self.launch(text, run_as="", program=program)
        self.assertEqual(service.finger("fault"), "Internal error in server\r\n")
        service.wait_for("AttributeError")
        dated = call("getUser", xmlrpc.client.DateTime("20260101T00:00:00"))
        for body, words in (
            (call("system.methodHelp", "getUser"), "<string>The user's status"),
            (KOI8_CALL, r"<string>(&#1084;&#1080;&#1088;|[\w ]+ well-formed XML-RPC)</string>"),
            (dated, "wrong parameters"),
        ):
            self.assertRegex(service.rpc(body), words)
        for encoding in ("utf-16", "utf-7", "idna", "zip", "x" * 99, "cp1251", "big5"):
            body = call("getUser", "moshez").replace(b"?>", f" encoding='{encoding}'?>".encode())
            self.assertIn("methodResponse", service.rpc(body), encoding)
        self.assertEqual(service.finger("moshez"), "x\r\n")
        self.assertEqual("\n".join(service.log).count("Traceback"), 1)


HALF = {"finger": b"mosh", "setter": b"moshez\nhacked", "web": b"GET / HTTP/1.1\r\nHost: "}
ENDLESS = [
    ("finger", b" "),
    ("finger", b"\xff\xfb\x01"),
    ("finger", b"\xff\xfa"),
    ("finger", b"x"),
    ("finger", b"\r"),
    ("web", b"\r\n"),
    ("web", b"GET / HTTP/1.1\r\nX:"),
    ("web", b"x"),
    ("setter", b"x"),
    ("setter", b"\n"),
    ("setter", b"x\n"),
    ("setter", b"\r"),
]
SOAP = b"POST /RPC2 HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
KINDS = [  # of connections; %d is another number each time
    *[("finger", data) for data in (b"moshez\r\n", b"\r\n", b"%d\r\n", b"half%d", b"")],
    ("finger", b"%d" + b"x" * 60_000),
    ("finger", b"\xff\xfa%d" + b"y" * 60_000),
    *[("setter", data) for data in (b"shawn\n%d\n", b"half", b"a:b\n\n", b"", b"\0" * 9_999)],
    ("web", b"GET /moshez HTTP/1.1\r\nHost: x\r\n\r\n" * 3),
    ("web", b"GET /nobody%d HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("web", b"GET /?format=json HTTP/1.0\r\n\r\n"),
    ("web", b"GET /%d HTTP/1.1\r\n" + b"X: %%\r\n" * 2_000 + b"\r\n"),
    ("web", b"GET /half"),
    ("web", b"\xff" * 30_000),
    ("web", SOAP % 62 + b"<!DOCTYPE x [<!ENTITY a 'aaaa'>]><methodCall>&a;</methodCall>"),
    ("web", SOAP % 25_221 + b"<methodCall><params>" + b"<param><value><array><data>" * 940),
    ("web", SOAP % 60_000 + b"broken off"),
]
EVIL = "\x1b[31m\x9b2J\u202eforged\x85\u2028\b\r2026-01-01 00:00:00,000 ERROR forged"
QUOTED = "".join(f"%{byte:02X}" for byte in (EVIL + "\n").encode())
FORGERIES = [  # and what is logged of them
    ("finger", EVIL + "\r\n", "forged"),
    ("finger", f"x@{EVIL}\r\n", "'x'"),
    ("finger", "ev\x1b[2Jil\u202e\u2028\x9b\u00e9\r\n", "ev.*il"),
    ("setter", f"{EVIL}\nstatus\n", "another protocol"),
    ("setter", f"name{EVIL[:20]}\n{EVIL}\n", "another protocol"),
    ("web", f"GET /{QUOTED}?{QUOTED} HTTP/1.1\r\nHost: x\r\n\r\n", "%1B"),
    ("web", f"GET /\x1b[31m\n2026 ERROR forged HTTP/1.1\r\nHost: {EVIL}\r\n\r\n", "400"),
    ("web", f"GET /é\x9b HTTP/1.1\r\nHost: x\r\nX: {EVIL}\r\n\r\n", "400"),
    ("web", "GET /evil\u202e\u2028\x9b\u00e9 HTTP/1.1\r\nHost: x\r\n\r\n", "evil.*404"),
    ("web", "GET /shawn HTTP/1.1\r\nHost: x\r\nIf-None-Match: *\r\n\r\n", "shawn.*304"),
    ("web", f"{EVIL[1:5]} / HTTP/1.1\r\nHost: x\r\n\r\n", "400"),
]


class Lines(fingerd.Server):
    """A server for tests: it replies to each line, in the way that the line says."""

    name, seconds = "lines", 60.0
    fault = b"fault\n"
    go: threading.Event

    def reply(self, received: bytes, ended: bool, connection: Any) -> Any:
        line, end, _ = received.partition(b"\n")
        if not end:
            return None
        reply = fingerd.Reply([line + b"\n"], len(line) + 1, close=line == b"bye")
        if line == b"fault":
            raise ZeroDivisionError
        if line.startswith(b"long"):
            return fingerd.Reply([b"x" * 1_000_000] * 9 + [b"\n"], len(line) + 1, close=False)
        if line.startswith(b"job"):
            return lambda: (self.go.wait(DEADLINE), reply)[1]
        if line == b"bad job":
            return lambda: 1 / 0
        return reply


class ConnectionTest(Case):
    """The states of a connection; the test is the loop of the server."""

    def setUp(self) -> None:
        self.patch(DRAIN_SECONDS=0.01)
        self.listener = fingerd.listen("finger", "127.0.0.1:0")
        self.lines = Lines(self.listener, fingerd.Site(make_store()))
        self.lines.go = threading.Event()
        self.addCleanup(self.end)

    def end(self) -> None:
        self.lines.go.set()
        loop = threading.Thread(target=self.lines.run)
        loop.start()
        self.lines.shutdown()
        loop.join()

    def turn(self, seconds: float = 0.0) -> None:
        """One turn of the loop; wait for events for so long at the most."""
        self.lines.turn(seconds)

    def client(self, data: bytes = b"", source: str = "127.0.0.1") -> socket.socket:
        return self.keep(connect(self.listener.getsockname()[1], data, source=source))

    def states(self) -> list[str]:
        """The states of the connections that wait or work, the longest idle first."""
        return [connection.state for connection in self.lines.connections]

    def reads(self, sock: socket.socket, wanted: bytes) -> None:
        """Checks that the client receives this while the loop turns."""
        came = b""
        sock.setblocking(False)
        end = time.monotonic() + DEADLINE
        while len(came) < len(wanted) and time.monotonic() < end:
            self.turn(0.01)
            with contextlib.suppress(BlockingIOError):
                chunk = sock.recv(1_000_000)
                came += chunk
                if not chunk:
                    break
        self.assertEqual(came[-50:], wanted[-50:])
        self.assertEqual(len(came), len(wanted))

    def closed(self, sock: socket.socket) -> None:
        """Checks that the connection ends while the loop turns."""
        sock.setblocking(False)

        def ended() -> bool:
            self.turn(0.01)
            try:
                return sock.recv(100) == b""
            except BlockingIOError:
                return False
            except ConnectionError:
                return True

        until(ended)

    def test_an_incomplete_request_waits_for_the_rest(self) -> None:
        sock = self.client(b"he")
        until(lambda: self.turn() or self.states() == ["waiting"])
        sock.sendall(b"llo\n")
        self.reads(sock, b"hello\n")
        self.assertEqual(self.states(), ["waiting"])
        sock.sendall(b"bye\n")
        self.reads(sock, b"bye\n")
        self.closed(sock)
        self.assertEqual(self.states(), ["waiting"], "what the client sends is dropped for a while")
        sock.close()
        until(lambda: self.turn() or self.states() == [])

    def test_a_whole_request_that_is_the_last_one_leaves_nothing(self) -> None:
        sock = self.client(b"bye\n")
        self.reads(sock, b"bye\n")
        self.assertEqual(self.states(), [])
        self.closed(sock)

    def test_a_byte_that_comes_between_the_reply_and_the_close(self) -> None:
        sock, close = self.client(b"bye\n"), self.lines.shutdown_request

        def late(connection: Any) -> None:
            with contextlib.suppress(OSError):
                sock.sendall(b"late")
            close(connection)

        with mock.patch.object(self.lines, "shutdown_request", late):
            self.reads(sock, b"bye\n")

    def test_requests_that_come_together_are_answered_in_turns(self) -> None:
        one, other = self.client(b"1\n2\n3\n"), self.client(b"4\n")
        replies: list[bytes] = []
        with mock.patch.object(self.lines, "reply", wraps=self.lines.reply) as reply:
            self.reads(other, b"4\n")
            self.reads(one, b"1\n2\n3\n")
            replies = [call[0][0].split(b"\n")[0] for call in reply.call_args_list]
        self.assertLess(replies.index(b"4"), replies.index(b"2"), replies)

    def test_a_turn_has_one_reply_for_each_connection(self) -> None:
        self.client(b"again\n" * 1_000)
        until(lambda: self.turn() or self.states())
        with mock.patch.object(self.lines, "reply", wraps=self.lines.reply) as reply:
            for _ in range(20):
                self.turn(0.01)
        self.assertTrue(15 < reply.call_count <= 20, reply.call_count)

    def test_a_job_is_computed_by_a_worker(self) -> None:
        sock, before = self.client(b"job\nnext\n"), threading.active_count()
        until(lambda: self.turn() or self.states() == ["working"])
        self.assertEqual(threading.active_count(), before + 1)
        self.reads(self.client(b"quick\n"), b"quick\n")
        self.lines.go.set()
        self.reads(sock, b"job\nnext\n")
        self.assertEqual(self.lines.workers, 0)

    def test_jobs_beyond_the_workers_wait_for_one(self) -> None:
        self.patch(WORKERS=2)
        before = threading.active_count()
        socks = [self.client(b"job %d\n" % number) for number in range(5)]
        until(lambda: self.turn() or self.states() == ["working"] * 5)
        self.assertEqual(threading.active_count(), before + 2)
        self.lines.go.set()
        for number, sock in enumerate(socks):
            self.reads(sock, b"job %d\n" % number)

    def test_networks_take_turns_with_their_jobs(self) -> None:
        self.patch(WORKERS=1)
        busy = [self.client(b"job %d\n" % number) for number in range(4)]
        until(lambda: self.turn() or self.states() == ["working"] * 4)
        other = self.client(b"job other\n", source="127.0.0.2")
        until(lambda: self.turn() or self.states() == ["working"] * 5)
        with mock.patch.object(self.lines, "send", wraps=self.lines.send) as sent:
            self.lines.go.set()
            self.reads(busy[-1], b"job 3\n")
            self.reads(other, b"job other\n")
        order = [bytes(call[0][1].pieces[0]) for call in sent.call_args_list if len(call[0]) > 1]
        self.assertLess(order.index(b"job other\n"), order.index(b"job 2\n"), order)

    def test_without_threads_the_loop_computes(self) -> None:
        self.lines.go.set()
        with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError):
            self.reads(self.client(b"job\n"), b"job\n")

    def test_a_fault_ends_its_connection(self) -> None:
        for data in (b"fault\n", b"bad job\n"):
            with self.assertLogs("fingerd", "ERROR") as logged:
                sock = self.client(data)
                self.reads(sock, b"fault\n")
                self.closed(sock)
            self.assertIn("ZeroDivisionError", logged.output[0])

    def test_a_reply_that_is_taken_slowly(self) -> None:
        sock = self.client(b"long\nnext\n")
        until(lambda: self.turn() or self.lines.readers)
        self.assertEqual(self.states(), ["waiting"])
        self.reads(sock, b"x" * 9_000_000 + b"\nnext\n")
        self.assertEqual(len(self.lines.readers), 0)
        (connection,) = self.lines.connections
        self.assertGreater(connection.deadline, time.monotonic() + 50, "the time of a new request")

    def test_a_reply_that_is_cut_off_ends_in_a_reset(self) -> None:
        sock = self.client(b"long\n")
        until(lambda: self.turn() or self.lines.readers)
        until(lambda: self.turn() or self.lines.evict(1))
        with self.assertRaises(ConnectionResetError):
            while sock.recv(1_000_000):
                pass

    def test_many_slow_readers_give_way(self) -> None:
        self.patch(HEAVY=2, TAKE_SECONDS=0.05)
        socks = [self.client(b"long\n")]
        until(lambda: self.turn() or len(self.lines.readers) == 1)
        socks += [self.client(b"long\n") for _ in range(2)]
        until(lambda: self.turn() or len(self.lines.readers) == 3)
        until(lambda: self.lines.service_actions() or len(self.states()) == 2)
        self.patch(TAKE_SECONDS=DEADLINE)
        for sock in socks[1:]:
            self.reads(sock, b"x" * 9_000_000 + b"\n")

    def test_many_fast_readers_do_not_give_way(self) -> None:
        self.patch(HEAVY=1)
        socks = [self.client(b"long\n") for _ in range(3)]
        until(lambda: self.turn() or len(self.lines.readers) == 3)
        self.lines.service_actions()
        for sock in socks:
            self.reads(sock, b"x" * 9_000_000 + b"\n")

    def test_a_reader_that_takes_nothing_is_closed(self) -> None:
        self.patch(SEND_SECONDS=0.05)
        self.client(b"long\n")
        until(lambda: self.turn() or self.lines.readers)
        until(lambda: self.lines.service_actions() or self.states() == [])

    def test_a_reader_that_takes_little_is_closed(self) -> None:
        self.patch(SEND_SECONDS=0.5, SLOWEST_READER=10_000_000_000)
        sock = self.client(b"long\n")
        until(lambda: self.turn() or self.lines.readers)
        until(lambda: self.lines.service_actions() or (sock.recv(9_999) and self.states() == []))

    def test_a_long_request_that_is_worked_on_does_not_give_way(self) -> None:
        self.patch(HEAVY=1, LIGHT_BYTES=10)
        sock = self.client(b"job " + b"x" * 20)
        until(lambda: self.turn() or self.lines.long)
        sock.sendall(b"\n")
        until(lambda: self.turn() or self.states() == ["working"])
        for _ in range(3):
            self.client(b"y" * 20)
        until(lambda: self.turn() or len(self.lines.long) == 1)
        self.lines.go.set()
        self.reads(sock, b"job " + b"x" * 20 + b"\n")

    def test_a_long_request_that_is_refused_leaves_no_trace(self) -> None:
        self.patch(HEAVY=1, LIGHT_BYTES=10, WORKERS=1)
        one, other = (self.client(b"job\n", source=f"127.0.0.{n}") for n in (3, 4))
        until(lambda: self.turn() or self.states() == ["working"] * 2)
        self.closed(self.client(b"job " + b"x" * 20 + b"\n"))
        self.lines.go.set()
        self.reads(one, b"job\n")
        self.reads(other, b"job\n")
        self.assertEqual((self.lines.workers, self.lines.jobs), (0, {}))

    def test_a_worker_whose_connection_was_closed_counts_no_more(self) -> None:
        self.client(b"job\n")
        until(lambda: self.turn() or self.states() == ["working"])
        for connection in list(self.lines.connections):
            self.lines.shutdown_request(connection)
        self.lines.go.set()
        until(lambda: self.turn() or self.lines.workers == 0)

    def test_long_requests_that_wait_for_a_worker_are_few(self) -> None:
        self.patch(LONG_JOBS=1, LIGHT_BYTES=10, WORKERS=1)
        line = b"job " + b"x" * 20 + b"\n"
        for count in range(1, 3):  # one has the worker
            self.client(line)
            until(lambda n=count: self.turn() or self.states() == ["working"] * n)
        self.closed(self.client(line))
        self.assertEqual(self.states(), ["working"] * 2)

    def test_many_long_requests_in_part_give_way(self) -> None:
        self.patch(HEAVY=2, LIGHT_BYTES=10)
        socks = [self.client(b"x" * 20) for _ in range(3)]
        until(lambda: self.turn() or len(self.states()) == 2)
        self.closed(socks[0])

    def test_a_long_request_of_another_network_does_not_give_way(self) -> None:
        self.patch(HEAVY=2, LIGHT_BYTES=10)
        first = self.client(b"x" * 20, source="127.0.0.3")
        until(lambda: self.turn() or len(self.states()) == 1)
        socks = [self.client(b"x" * 20) for _ in range(4)]
        until(lambda: self.turn() or len(self.states()) == 2)
        first.sendall(b"\n")
        self.reads(first, b"x" * 20 + b"\n")
        self.closed(socks[0])

    def test_the_longest_idle_of_the_largest_network_is_evicted(self) -> None:
        self.lines.ceiling = 3
        first = self.client(b"a", source="127.0.0.3")
        older, newer = self.client(b"b"), self.client(b"c")
        until(lambda: self.turn() or len(self.states()) == 3)
        late = self.client(b"d", source="127.0.0.4")
        self.closed(older)
        for sock, letter in ((first, b"a"), (newer, b"c"), (late, b"d")):
            sock.sendall(b"\n")
            self.reads(sock, letter + b"\n")

    def test_a_connection_whose_bytes_have_come_is_not_evicted(self) -> None:
        self.lines.ceiling = 2
        older, newer = self.client(b"a"), self.client(b"b")
        until(lambda: self.turn() or len(self.states()) == 2)
        older.sendall(b"\n")
        self.lines.selector.select(DEADLINE)
        late = self.client(b"c")
        self.closed(newer)
        self.reads(older, b"a\n")
        late.sendall(b"\n")
        self.reads(late, b"c\n")

    def test_a_connection_whose_next_request_came_with_the_last_is_not_evicted(self) -> None:
        sock = self.client(b"a\nb\n")
        until(lambda: self.turn() or self.lines.handed_back)
        self.assertFalse(self.lines.evict(1))
        self.reads(sock, b"a\nb\n")

    def test_a_connection_may_be_closed_twice(self) -> None:
        for data in (b"half", b"long\n"):
            self.client(data)
            until(lambda: self.turn() or self.states())
            for connection in list(self.lines.connections) * 2:
                self.lines.shutdown_request(connection)
        self.assertFalse(self.lines.sizes)
        self.reads(self.client(b"next\n"), b"next\n")

    def test_if_nothing_can_be_evicted_a_turn_looks_once(self) -> None:
        sock = self.client(b"job\n")
        until(lambda: self.turn() or self.states() == ["working"])
        for _ in range(2):
            self.assertFalse(self.lines.evict(1))
            with mock.patch.object(self.lines.selector, "select", side_effect=AssertionError):
                self.assertFalse(self.lines.evict(1))
            self.turn()
        self.lines.go.set()
        self.reads(sock, b"job\n")
        self.assertTrue(self.lines.evict(1))

    def test_if_the_largest_network_only_works_another_is_evicted_from(self) -> None:
        self.lines.ceiling = 6
        small = self.client(b"half", source="127.0.0.3")
        until(lambda: self.turn() or self.states())
        larger = [self.client(b"half", source="127.0.0.5") for _ in range(2)]
        until(lambda: self.turn() or len(self.states()) == 3)
        working = [self.client(b"job\n") for _ in range(3)]
        until(lambda: self.turn() or self.states() == ["waiting"] * 3 + ["working"] * 3)
        late = self.client(b"half", source="127.0.0.4")
        self.closed(larger[0])
        for sock in (small, larger[1], late):
            sock.sendall(b"\n")
            self.reads(sock, b"half\n")
        self.assertEqual(sum(self.lines.sizes.values()), 6)
        self.lines.go.set()
        self.reads(working[0], b"job\n")

    def test_the_connections_to_evict(self) -> None:
        for networks, count, wanted in (
            ("", 1, []),
            ("a", 1, [0]),
            ("abc", 2, [0, 1]),
            ("abcb", 1, [1]),
            ("abcb", 2, [0, 1]),
            ("abbbcc", 1, [1]),
            ("abbbcc", 3, [1, 2, 4]),
            ("aabbbb", 2, [2, 3]),
            ("aabbbb", 9, [0, 1, 2, 3, 4, 5]),
        ):
            with self.subTest(networks, count=count):
                waiting: list[Any] = [mock.Mock(network=letter) for letter in networks]
                sizes: Any = collections.Counter(networks)
                chosen = fingerd.choose_evicted(waiting, sizes, count)
                self.assertEqual([waiting.index(each) for each in chosen], wanted)
                self.assertEqual(sizes, collections.Counter(networks))

    def test_a_connection_that_works_is_not_evicted(self) -> None:
        self.lines.ceiling = 1
        sock = self.client(b"job\n")
        until(lambda: self.turn() or self.states() == ["working"])
        self.closed(self.client(b"half"))
        self.lines.go.set()
        self.reads(sock, b"job\n")

    def test_a_deadline_ends_a_wait(self) -> None:
        for data in (b"half", b"long\n"):
            sock = self.client(data)
            until(lambda: self.turn() or self.states() == ["waiting"])
            (connection,) = self.lines.connections
            connection.deadline = 0.0
            self.lines.service_actions()
            self.assertEqual((self.states(), connection.state), ([], "closed"))
            sock.close()

    def test_a_client_may_go_at_any_moment(self) -> None:
        for data in (b"", b"half", b"hello\n", b"long\n", b"job\n"):
            with self.subTest(data):
                self.lines.go.clear()
                sock = self.client(data)
                until(lambda: self.turn() or self.states())
                reset(sock)
                self.lines.go.set()
                until(lambda: self.turn() or self.states() == [])
        self.assertEqual(self.lines.workers, 0)

    def test_networks(self) -> None:
        for host, network in (
            ("192.0.2.1", b"192.0.2.1"),
            ("2001:db8::1", b"\x20\x01\x0d\xb8\0\0\0\0"),
            ("2001:db8::2", b"\x20\x01\x0d\xb8\0\0\0\0"),
            ("fe80::1%lo", b"\xfe\x80\0\0\0\0\0\0"),
        ):
            self.assertEqual(fingerd.network_of(host), network)


class HostileTest(Case):
    def test_limits_let_ordinary_clients_in(self) -> None:
        limit = (300, 300)
        service = self.launch(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limit))
        held: dict[str, list[socket.socket]] = {}
        for face, count in (("finger", PEERS), ("setter", PEERS // 7), ("web", PEERS * 3 // 7)):
            port, parts = service.port(face), (b"", HALF[face][:1], HALF[face])
            sources = [f"127.0.0.{2 + n % 50}" if n % 2 else "127.0.0.1" for n in range(count)]
            held[face] = [
                self.keep(connect(port, parts[n % 3], source=source))
                for n, source in enumerate(sources)
            ]

        def trickle(_: int) -> None:
            for face in FACES:
                n = random.randrange(len(held[face]))
                try:
                    held[face][n].send(b"x")
                except OSError:  # evicted: come back
                    held[face][n].close()
                    held[face][n] = self.keep(connect(service.port(face), HALF[face]))

        most = 0
        with meanwhile(1, trickle, pause=0.02):
            for n in range(40):
                self.assertEqual(service.finger("moshez"), HAPPY.decode())
                self.assertIn("shawn: ", service.finger(""))
                self.assertEqual(service.get().status, 200)
                self.assertEqual(service.get("/").status, 200)
                self.assertEqual(service.set(f"user{n}", "x"), "OK\r\n")
                with connect(service.port("finger"), b"mosh") as late:
                    late.sendall(b"ez\r\n")
                    self.assertEqual(read_all(late), HAPPY)
                most = max(most, service.threads())
        self.assertLess(most, 30, "a connection that waits needs no thread")
        self.assertGreater(service.descriptors(), 200)

    def test_servers_share_the_descriptors(self) -> None:
        servers = [mock.Mock(), mock.Mock()]
        for limit, ceiling in (
            (1_000_000, fingerd.CONNECTIONS),
            (1_064, 500),
            (20, 1),
        ):
            with mock.patch.multiple(
                resource, getrlimit=lambda _, n=limit: (n, n), setrlimit=mock.DEFAULT
            ):
                fingerd.limit_connections(servers)
            self.assertEqual([server.ceiling for server in servers], [ceiling] * 2)

    def test_thousands_of_connections_wait_without_threads(self) -> None:
        count = min(10_000, resource.getrlimit(resource.RLIMIT_NOFILE)[1] // 3) * 3 // 4
        service = self.launch()
        before, threads = service.resident(), service.threads()
        for number in range(count):
            source = f"127.0.{number // 250}.{number % 250 + 1}"
            self.keep(connect(service.port("web"), request("/moshez"), source=source))
        until(lambda: service.descriptors() > count)
        self.assertEqual(service.finger("moshez"), HAPPY.decode())
        self.assertEqual(service.threads(), threads)
        self.assertLess(service.resident() - before, 6_000 * count)  # 60 MB for 10,000

    def test_slow_readers_of_a_long_page_share_it(self) -> None:
        service = self.launch("".join(f"user{n}: {n:0800}\n" for n in range(1_000)))
        before = service.resident()
        for _ in range(60):
            self.keep(slow_reader(service.port("web"), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 8))
        self.assertGreater(service.descriptors(), 60)
        self.assertLess(service.resident() - before, 25_000_000)
        self.assertLess(service.threads(), 30)

    def test_slow_reader_is_bounded_in_time(self) -> None:
        self.patch(SEND_SECONDS=0.2, SLOWEST_READER=1e9, MAX_LISTED=1_000_000)
        server = self.server(fingerd.FingerServer, make_store(CROWDED))
        with slow_reader(server.port, b"\r\n"):
            until(lambda: not server.connections, "still waiting for it")

    def test_endless_input_is_cut_short(self) -> None:
        service = self.launch()
        before = service.resident()
        for face, piece in ENDLESS:
            with self.subTest(face=face, piece=piece):
                chunk, sent = piece * (60_000 // len(piece)), 0
                with contextlib.suppress(ConnectionError), connect(service.port(face)) as sock:
                    sock.settimeout(5)
                    while sent < 10_000_000:
                        sent += sock.send(chunk)
                self.assertLess(sent, 10_000_000)
                self.assertLess(service.resident() - before, 20_000_000)
        self.assertEqual(service.finger("shawn"), "alive\r\n")

    def test_no_descriptors_left(self) -> None:
        words = "import fingerd; fingerd.SPARE_DESCRIPTORS = -9_999; fingerd.main()"
        service = self.launch(
            program=(sys.executable, "-c", words),
            cwd=HERE,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60)),
        )
        held = [self.keep(connect(service.port("finger"), b"half")) for _ in range(90)]
        service.wait_for("finger: cannot accept")
        for _ in range(5):
            self.assertEqual(service.finger("shawn"), "alive\r\n")
        waiting = [self.keep(connect(service.port("web"), request("/shawn"))) for _ in range(50)]
        service.wait_for("web: cannot accept")
        start, used = time.monotonic(), processor(service.pid)
        time.sleep(1.0)  # to measure, not to be in time
        self.assertLess((processor(service.pid) - used) / (time.monotonic() - start), 0.5)
        for sock in held + waiting:
            sock.close()
        until(lambda: service.set("shawn", "well") == "OK\r\n", "a descriptor for the state file")
        self.assertEqual(service.finger("shawn"), "well\r\n")
        self.assertEqual(sum("finger: cannot accept" in line for line in service.log), 1)

    def test_reset_before_the_accept_does_not_end_the_service(self) -> None:
        service = self.launch()
        service.signal(signal.SIGSTOP)
        for face, data in itertools.product(FACES, (b"", b"half", b"shawn\r\n", b"\r\n" * 9)):
            reset(connect(service.port(face), data))
        service.signal(signal.SIGCONT)
        self.assertEqual(service.finger("shawn"), "alive\r\n")
        self.assertEqual(service.set("shawn", "well"), "OK\r\n")
        self.assertIn(b"Happy", service.get().body)
        self.assertNotIn("Traceback", "\n".join(service.log))

    def test_broken_stderr_does_not_end_the_service(self) -> None:
        service = self.launch(USERS, "-v")
        with open(os.devnull, "rb") as null:
            os.dup2(null.fileno(), service.process.stderr.fileno())  # type: ignore[union-attr]
        service.finger("the reader still waits for this line")
        service.reader.join(DEADLINE)
        for _ in range(20):
            self.assertEqual(service.finger("shawn"), "alive\r\n")
            self.assertIn(b" 400 ", ask(service.port("web"), b"\0\r\n\r\n"))
            self.assertRegex(service.set("a:b", "x"), "^ERROR ")
        self.assertEqual(service.stop(), 0)

    def test_web_page_sets_nothing(self) -> None:
        service = self.launch()
        head = " HTTP/1.1\r\nHost: localhost:1079\r\nOrigin: http://evil\r\n\r\nmoshez\nhacked\n"
        for first in ("POST /", "POST /moshez", "GET /a%0Ab", "OPTIONS *", "PRI *", "patch /"):
            with self.subTest(first):
                answer = ask(service.port("setter"), (first + head).encode())
                self.assertRegex(answer, rb"\AERROR [^\r\n]*\r\n\Z")
        service.get(method="POST", body=b"moshez\nhacked\n")
        service.rpc(call("setUser", "moshez", "hacked"))
        service.get("/?user=moshez&status=hacked")
        self.assertEqual(service.finger("").splitlines(), USERS.splitlines())

    def test_log_cannot_be_forged(self) -> None:
        service = self.launch(USERS, "-v")
        for face, data, _ in FORGERIES:
            ask(service.port(face), data.encode())
        service.rpc(call("\n\x85forged"))
        service.finger("the last one")
        service.wait_for("the last one")
        for face, data, logged in FORGERIES:
            with self.subTest(data):
                service.wait_for(f"{face}: .*{logged}")
        for line in service.log:
            self.assertRegex(line, r"\A\d{4}-\d\d-\d\d [\d:,]{12} (DEBUG|INFO|WARNING) [ -~]*\Z")

    def test_equal_complaints_are_summed_up(self) -> None:
        log, handler = logging.Logger("flood"), mock.Mock(level=0)
        keep = fingerd.FloodFilter().filter
        handler.handle = lambda record: keep(record) and handler.emit(record.getMessage())
        log.addHandler(handler)
        in_parallel(4, lambda i: [log.log(20 + i * 10, "peer %d: bad", n) for n in range(1_000)])
        log.warning("something else")
        lines = [arguments[0][0] for arguments in handler.emit.call_args_list]
        self.assertLess(len(lines), 200)
        self.assertEqual(sum("more like this" in line for line in lines), 1)
        self.assertEqual(lines[-1], "something else")

    def test_nothing_grows(self) -> None:
        service = self.launch()

        def peer(n: int) -> None:
            face, data = KINDS[n % len(KINDS)]
            with contextlib.suppress(ConnectionError), connect(service.port(face)) as sock:
                sock.sendall(data % n if b"%d" in data else data)
                if n % 3:
                    sock.shutdown(socket.SHUT_WR)
                    read_all(sock)
                else:
                    reset(sock)

        def census() -> tuple[int, int]:
            return service.threads(), service.descriptors()

        rest, resident = census(), []
        with ThreadPoolExecutor(6) as pool:
            for numbers in (range(400), range(1_000, 1_000 + SOAK)):
                list(pool.map(peer, numbers))
                until(lambda: census() == rest, "threads and descriptors")
                resident.append(service.resident())
        self.assertLess(resident[1] - resident[0], 12_000_000)  # what is remembered: 1,000 pages
        self.assertEqual(service.complaints(), [])


GOOD = [
    b"moshez\r\n",
    b"/W shawn@localhost\r\n",
    b"\xff\xfb\x01\xff\xfa\x18\xff\xf0 \r\n",
    b"\r\0",
    b"shawn\nnew\n",
    "né\u200d\u202e\tx\n\x85\ufeffy\n".encode(),
    b"# c\na: b\n:\n\xef\xbb\xbfx:\n",
    b"GET /moshez?format=json HTTP/1.1\r\nHost: localhost\r\nAccept: text/*;q=0.5,*/*;q=0\r\n\r\n",
    b"HEAD http://x//%00/..%2f%ff HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    b"POST /RPC2 HTTP/1.1\r\nHost: x\r\nContent-Length: 7\r\nExpect: 100-continue\r\n\r\n<a></a>",
    b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    b"3\r\nabc\r\n2;x\r\nde\r\n0\r\nX: y\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET /\r\n",
    call("getUser", "shawn"),
    KOI8_CALL,
    call("system.multicall", [{"methodName": "getUser", "params": ["x"]}] * 2),
    call("x", 1, b"y"),
]
EDGES = [
    b"\r\n",
    b"\n",
    b"\0",
    b"\xff",
    b"\xff\xfa",
    b"\xff\xfd",
    b" ",
    b":",
    b"@",
    b"/W",
    b"\xe9",
    b"\xc3",
    b"%",
    b"?",
    b";q=",
    b",",
    b"*/*",
    b"&#1;",
    b"-1",
    b"9" * 5_000,
    b"\xed\xa0\x80",
    b"<int>",
    b"</params>",
    b"<fault>",
]


def cases(count: int) -> Iterator[bytes]:
    """Good input, changed here and there; and noise."""
    chance = random.Random(SEED)
    for _ in range(count):
        data = bytearray(chance.choice(GOOD))
        for _ in range(chance.randrange(4)):
            at, other = chance.randrange(len(data) + 1), chance.choice(GOOD)
            put = [
                bytes([chance.randrange(256)]),
                b"",
                other[: chance.randrange(len(other))],
                data[at : at + 9] * chance.choice([2, 9, 2_000]),
                chance.choice(EDGES),
                bytes(chance.choices(range(256), k=chance.randrange(200))),
            ]
            data[at : at + chance.choice([0, 1, 9])] = chance.choice(put)
        yield bytes(data)


class FuzzTest(Case):
    def parsers_hold(self, data: bytes) -> None:
        """Checks what every parser promises for any input."""

        def is_clean(*texts: str) -> None:
            for text in texts:
                self.assertEqual((fingerd.clean(text), len(f"{text}.".splitlines())), (text, 1))
                text.encode()

        latin = data.decode("latin-1")
        is_clean(fingerd.clean(latin), fingerd.clean(data.decode("utf-8", "surrogateescape")))
        for name, status in parse_users(data).texts.items():
            is_clean(name, status)
            line = f"{name}: {status}\n".encode()
            again = parse_users(b"\n" + line)
            self.assertEqual(
                (fingerd.entry_problem(name, status), again.texts), ("", {name: status})
            )
        is_clean(fingerd.parse_finger(data, True).user)
        user, text, problem, _ = parse_setting(data, True)
        is_clean(user, text, problem)
        self.assertTrue(problem or not fingerd.entry_problem(user, text))
        request = fingerd.parse_http_request(data)
        if request and request.problem:
            http.HTTPStatus(request.problem)
        elif request:
            self.assertLessEqual(len(request.body or b""), fingerd.MAX_BODY)
            is_clean(request.user)
        for query, accept in (("", latin), (latin, ""), ("format=" + latin, latin)):
            self.assertIn(fingerd.choose_format(query, accept), ["", *fingerd.FORMATS])
        top = raw("POST / HTTP/1.1", "Host: h", "Transfer-Encoding: chunked")
        rpc = fingerd.parse_rpc_call(data)
        self.assertEqual((type(rpc.method), type(rpc.params)), (str, tuple))
        self.assertFalse(rpc.fault and rpc.method)
        for parse in (
            lambda data: fingerd.parse_finger(data, False),
            lambda data: parse_setting(data, False),
            self.parse_http,
            lambda data: self.parse_http(top + data),
        ):
            early, later = parse(data[: len(data) // 2]), parse(data)
            if early is not None and not (isinstance(early, Query) and b"\xff" in data):
                if getattr(early, "problem", ""):
                    self.assertTrue(later.problem, "what is refused stays so")
                else:
                    self.assertEqual(later, early, "what is understood stays so")

    def parse_http(self, data: bytes) -> Any:
        """The request at the front of `data`, or None while it is incomplete."""
        request = fingerd.parse_http_request(data)
        return None if request and request.body is None else request

    def test_parsers(self) -> None:
        for number, data in enumerate(cases(FUZZ * 6)):
            try:
                self.parsers_hold(data)
            except Exception as problem:
                raise AssertionError(f"SEED={SEED}, case {number}: {data[:999]!r}") from problem

    def test_ports(self) -> None:
        service = self.launch()
        answers = [rb"\A", rb"\A(OK|ERROR [ -~]*)\r\n\Z", rb"\A(HTTP/1\.1 \d{3} |\Z)"]

        def client(me: int) -> None:
            for number, data in enumerate(cases(FUZZ)):
                if number % 4 == me:
                    face = number // 4 % 3
                    with contextlib.suppress(ConnectionError):  # what came after the end
                        answer = ask(service.port(FACES[face]), data)
                        self.assertRegex(answer, answers[face], (FACES[face], data))

        in_parallel(4, client)
        self.assertTrue(service.finger("moshez"))
        self.assertEqual(service.complaints(), [])


class ReloaderTest(Case):
    """A users file that is changed in every way while queries run."""

    def setUp(self) -> None:
        self.logged = self.watch_log("WARNING")
        self.patch(SETTLE_SECONDS=0.05)
        self.path, self.number = self.folder() / "users", 0
        self.rename()
        store = fingerd.StatusStore()
        self.reloader = fingerd.Reloader(fingerd.FileSource(self.path), store, 0.02)
        self.reloader.load(at_once=True)
        self.reloader.start()
        self.addCleanup(self.reloader.join, DEADLINE)
        self.addCleanup(self.reloader.cancel)
        self.port = self.server(fingerd.FingerServer, store).port

    def next(self) -> bytes:
        """What the file says next: a new number for two users."""
        self.number += 1
        return b"a: %06d\n%sb: %06d\n" % (self.number, b"# x\n" * 500, self.number)

    def rename(self, content: bytes | None = None) -> None:
        put(self.path, self.next() if content is None else content, age=0.0)

    def comes(self, value: str = "") -> None:
        """Returns once the latest number is shown, or `value`."""
        wanted = f"{value or format(self.number, '06')}\r\n".encode()
        until(lambda: ask(self.port, b"b\r\n") == wanted, wanted.decode())

    def complains(self, words: str) -> None:
        """Returns once a complaint is logged; the last good content stays."""
        until(lambda: any(words in line for line in self.logged), words)
        self.comes()

    def replaced_by_what_cannot_be_read(self) -> None:
        for make, words in (
            (lambda: None, "No such file"),
            (self.path.mkdir, "regular"),
            (lambda: os.mkfifo(self.path), "regular"),
            (lambda: self.path.symlink_to(self.path), "symbolic"),
            (lambda: self.path.symlink_to("/dev/zero"), "regular"),
            *([] if ROOT else [(lambda: self.path.touch(0), "Permission denied")]),
        ):
            del self.logged[:]
            self.path.unlink()
            make()
            self.complains(words)
            if self.path.is_dir():
                self.path.rmdir()
            self.rename()
            self.comes()

    def changed_in_place(self) -> None:
        for _ in range(2):
            with self.path.open("r+b", 0) as file:
                first, second = self.next().split(b"# x\n", 1)
                file.truncate()
                file.write(first)
                file.write(b"# x\n" + second)
            self.comes()
        self.path.write_bytes(self.next() + b"x" * 4_000_000 + b"\n")
        self.comes()
        os.truncate(self.path, 0)
        self.comes("No such user")
        self.rename()
        self.comes()
        no_colon = [byte for byte in range(1, 256) if byte != ord(":")]  # NUL would be UTF-16
        self.path.write_bytes(bytes(random.Random(SEED).choices(no_colon, k=200_000)))
        self.comes("No such user")
        self.rename()
        self.comes()

    def test_no_answer_is_wrong_or_late(self) -> None:
        slowest = [0.0]
        strict = True  # until the file says something else about the two

        def client(_: int) -> None:
            start, both = time.monotonic(), strict
            one, listing = ask(self.port, b"a\r\n"), ask(self.port, b"\r\n")
            slowest.append((time.monotonic() - start) / 2)
            self.assertRegex(one, rb"\A(\d{6}|No such user)\r\n\Z")
            self.assertRegex(listing, rb"\A(a: \d{6}\r\n)?(b: \d{6}\r\n)?\Z")
            if both:
                self.assertRegex(one, rb"\A\d{6}\r\n\Z")
                self.assertRegex(listing, rb"\Aa: (\d{6})\r\nb: \1\r\n\Z")

        with meanwhile(3, client):
            for _ in range(3):
                self.rename()
                self.comes()
            self.replaced_by_what_cannot_be_read()
            strict = False
            self.changed_in_place()
        self.assertTrue(self.reloader.is_alive())
        self.assertLess(max(slowest), 2.0)

    def test_too_large_is_refused_and_the_last_one_stays(self) -> None:
        for limit, content, words in (
            ({"MAX_FILE": 5_000}, b"a: big\n" * 1_000, "larger than 5000 bytes"),
            ({"MAX_USERS": 50}, b"".join(b"a%d: x\n" % n for n in range(99)), "more than 50 users"),
        ):
            with self.subTest(words):
                self.patch(**limit)
                del self.logged[:]
                self.rename(content)
                self.complains(words)
                complaints = list(self.logged)
                for _ in range(3):
                    self.reloader.look()
                self.comes()
                self.assertEqual(self.logged, complaints, "said once, and not taken back")
                self.assertIn(str(self.path), complaints[0])
                self.rename()
                self.comes()


class StopTest(Case):
    def test_idle_peers_do_not_hold_it_up(self) -> None:
        service = self.launch()
        for n in range(500):
            self.keep(connect(service.port(FACES[n % 3]), [b"", b"half"][n % 2]))
        start = time.monotonic()
        self.assertEqual(service.stop(), 0, service.log)
        self.assertLess(time.monotonic() - start, 5.0)
        self.assertEqual(service.complaints(), [])

    def test_queued_queries_are_answered(self) -> None:
        service = self.launch()
        queries = (
            ("finger", b"shawn\r\n", rb"alive\r\n\Z"),
            ("finger", b"\r\n", rb"moshez: [^\0]*alive\r\n\Z"),
            ("web", b"GET / HTTP/1.0\r\n\r\n", rb"HTTP/1\.1 200 OK[^\0]*</html>\s*\Z"),
            ("setter", b"moshez\nqueued\n", rb"OK\r\n\Z"),
        )
        service.signal(signal.SIGSTOP)
        until(lambda: service.proc("State")[0] == "T")
        queued = []
        for _, (face, query, answer) in itertools.product(range(15), queries):
            queued.append((self.keep(connect(service.port(face), query)), query, answer))
        service.signal(signal.SIGTERM)
        service.signal(signal.SIGCONT)
        wrong = []
        for sock, query, wanted in queued:
            came = b"reset"
            with contextlib.suppress(ConnectionError):
                came = read_all(sock)
            if not re.match(wanted, came):
                wrong.append((query, came))
        self.assertEqual(wrong, [], f"{len(wrong)} of {len(queued)}")
        self.assertEqual(service.end(), 0)

    def stopping(self) -> tuple[Service, socket.socket]:
        """A service that is stopping, and somebody who is still to read most of an answer."""
        service = self.launch("".join(f"{user}: {text}\n" for user, text in CROWDED.items()))
        target = b"GET /?format=text HTTP/1.0\r\n\r\n"
        sock = self.keep(slow_reader(service.port("web"), target))
        ports = [service.port(face) for face in FACES]
        service.signal(signal.SIGTERM)
        until(lambda: all(map(refused, ports)))
        return service, sock

    def test_answer_in_flight_is_delivered(self) -> None:
        service, sock = self.stopping()
        self.assertEqual(read_all(sock).count(b"x" * 1_000 + b"\n"), len(CROWDED))
        self.assertEqual(service.end(), 0)

    def test_a_locked_state_file_does_not_hold_up_the_end(self) -> None:
        service = self.launch()
        db = self.keep(sqlite3.connect(service.state, isolation_level=None))
        db.execute("BEGIN IMMEDIATE")
        port = service.port("setter")
        for n in range(100):
            self.keep(connect(port, f"user{n}\nx\n".encode()))
        until(lambda: service.threads() > fingerd.WORKERS)
        start = time.monotonic()
        self.assertEqual(service.stop(), 0)
        self.assertLess(time.monotonic() - start, 3.0)

    def activated(self, manager: socket.socket) -> tuple[list[int], Service]:
        """A service on listeners that are ours, and the ports."""
        listeners = [self.keep(socket.create_server(("127.0.0.1", 0), backlog=200)) for _ in FACES]
        high = [fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD_CLOEXEC, 50) for sock in listeners]
        for number in high:
            self.addCleanup(os.close, number)
        environ = dict(os.environ, LISTEN_FDS="3", LISTEN_FDNAMES=":".join(FACES))
        shell = ("sh", "-c", 'LISTEN_PID=$$ exec "$@"', "sh")
        service = self.launch(
            program=(*shell, *PROGRAM),
            env=dict(environ, NOTIFY_SOCKET=manager.getsockname()),
            close_fds=False,
            preexec_fn=lambda: [os.dup2(fd, 3 + n) for n, fd in enumerate(high)],
        )
        return [sock.getsockname()[1] for sock in listeners], service

    @needs("systemd-socket-activate")
    def test_systemd_may_pass_several_sockets_of_a_name(self) -> None:
        hosts = ["127.0.0.1", "::1" if socket.has_dualstack_ipv6() else "127.0.0.2", "127.0.0.3"]
        places = [(host, free_port()) for host in hosts]
        users = self.folder() / "users"
        put(users, USERS)
        listen = [f"--listen={host}:{port}".replace("::1", "[::1]") for host, port in places]
        program = ("systemd-socket-activate", *listen, "--fdname=finger:finger:web", *PROGRAM)
        words = command(users, program=program)
        process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        until(lambda: not any(refused(port, host) for host, port in places))
        for host, port in places[:2]:
            self.assertEqual(ask(port, b"moshez\r\n", host=host), HAPPY)
        self.assertEqual(fetch(places[2][1], host=hosts[2]).status, 200)
        process.terminate()
        self.assertEqual(process.wait(DEADLINE), 0)

    def test_sockets_that_cannot_be_used_end_the_start(self) -> None:
        stream = self.keep(socket.create_server(("127.0.0.1", 0)))
        for name, options, problem in (
            ("gopher", [], "LISTEN_FDNAMES: 'gopher' is no server, or off"),
            ("web", ["--web", "off"], "LISTEN_FDNAMES: 'web' is no server, or off: mask its unit"),
        ):
            with self.subTest(problem):
                shell = f"LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES={name}" + ' exec "$@" 3<&0'
                program = ("sh", "-c", shell, "sh", *PROGRAM)
                words = command("/etc/hosts", *options, program=program)
                self.refuses_to_start(words, problem, stdin=stream)

    def test_socket_activation_loses_nobody_in_a_restart(self) -> None:
        manager = self.keep(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        manager.settimeout(DEADLINE)
        manager.bind(str(self.folder() / "notify"))
        ports, service = self.activated(manager)
        self.assertEqual(manager.recv(99), b"READY=1")
        self.assertEqual([service.port(face) for face in FACES], ports)
        answered = [0] * 6

        def client(me: int) -> None:
            if me % 3 == 0:
                self.assertEqual(ask(ports[0], b"shawn\r\n"), b"alive\r\n")
            elif me % 3 == 1:
                self.assertEqual(ask(ports[1], b"moshez\n%d\n" % me), b"OK\r\n")
            else:
                self.assertEqual(fetch(ports[2], "/?format=text").status, 200)
            answered[me] += 1

        def more() -> None:
            wanted = [count + 20 for count in answered]
            until(lambda: over.is_set() or all(a >= w for a, w in zip(answered, wanted)))

        with meanwhile(6, client) as over:
            for _ in range(2):
                more()
                self.assertEqual(service.stop(), 0)
                service.start()
                self.assertEqual(manager.recv(99), b"READY=1")
            more()


# ================================================================================================
# 11. around it: other machines, odd surroundings, and the files beside it
# ================================================================================================

README = (HERE / "README.md").read_text(encoding="utf-8")


def ok(body: bytes, *headers: bytes) -> bytes:
    """A web server's response."""
    return b"HTTP/1.0 200 OK\r\n" + b"".join(headers) + b"\r\n" + body


class ReplicasTest(Case):
    """A users file that is another fingerd's."""

    def first(self, *options: str) -> Service:
        """A fingerd to copy, which finds its ports again when it is started again."""
        ports: list[str] = []
        for face in FACES:
            ports += [f"--{face}", f"127.0.0.1:{free_port()}"]
        return self.launch(USERS, *ports, *options, "--interval", "0.5")

    def url(self, first: Service, form: str = "json") -> str:
        return f"http://127.0.0.1:{first.port('web')}/?format={form}"

    def replica(self, first: Service, *options: str, form: str = "json") -> Service:
        """A fingerd that copies `first` twice a second."""
        return self.launch("", "--interval", "0.5", *options, source=self.url(first, form))

    PAGES: ClassVar = [
        *["/", "/?format=text", "/?format=json", "/?format=atom", "/moshez?format=text"],
        *["/moshez?format=json", "/moshez?format=atom", "/shawn?format=atom", "/zed?format=json"],
    ]

    def agree(self, *services: Service) -> bool:
        """Whether all of them give the same pages, bodies and headers, but for the Date."""
        pages = []
        for service in services:
            found = [service.get(target) for target in self.PAGES]
            pages.append([page._replace(headers={**page.headers, "date": ""}) for page in found])
        return all(each == pages[0] for each in pages)

    def test_all_replicas_tell_the_same_story(self) -> None:
        first = self.first()
        second = self.replica(first, "--web", f"127.0.0.1:{free_port()}")
        third = self.replica(second)
        everywhere = first, second, third
        until(lambda: self.agree(*everywhere), "at the start")
        first.set("moshez: 2h", "gone fishing")
        first.set("zed", "new here")
        until(lambda: "Until: " in third.finger("/W moshez"))
        until(lambda: self.agree(*everywhere), "a message and its end")
        first.set("zed", "")
        put(first.users, USERS + "amy: was in the file\n", age=0.0)
        until(lambda: "was in" in third.finger("amy"))
        until(lambda: self.agree(*everywhere), "taken back")
        self.assertEqual(third.finger("zed"), "No such user\r\n")
        first.set("amy", "once")
        first.set("amy", "")  # which a replica may not see
        for service in everywhere:
            service.stop()
        for service in everywhere[::-1]:
            service.start()
        until(lambda: self.agree(*everywhere), "after all were started again")
        first.set("moshez", "gone fishing")  # a new date for the same text
        until(lambda: "Until: " not in third.finger("/W moshez"))
        until(lambda: self.agree(*everywhere), "another date")

    def test_ids_in_feeds_are_the_same_on_every_host(self) -> None:
        feeds = []
        for host in ("a", "b"):
            policy = fingerd.Policy(finger_host=host)
            port = self.server(fingerd.WebServer, make_store(), policy).port
            feeds.append([fetch(port, f"/{user}?format=atom").body for user in ("", "moshez")])
        self.assertEqual(*feeds)
        self.assertIn(b"<id>tag:fingerd,2026:moshez#", feeds[0][1])
        for option, root in (
            ("--hostname=h", "tag:fingerd,2026:"),
            ("--public-url=http://h/s", "http://h/s/"),
            ("--private", "tag:fingerd,2026:"),
        ):
            policy = fingerd.make_policy(fingerd.parse_args([option, "users"]))
            self.assertEqual(policy.feed_root, root)

    def test_a_text_list_still_works(self) -> None:
        first = self.first()
        replica = self.replica(first, form="text")
        first.set("moshez", "gone fishing")
        until(lambda: replica.finger("moshez") == "gone fishing\r\n")
        self.assertEqual(replica.finger(""), first.finger(""))

    def test_a_replica_says_what_the_first_says(self) -> None:
        first = self.first()
        replica = self.replica(first)
        self.assertEqual(replica.finger("moshez"), "Happy and well\r\n")
        first.set("moshez", "gone fishing")
        until(lambda: replica.finger("moshez") == "gone fishing\r\n")
        put(first.users, "shawn: still alive\n", age=0.0)
        until(lambda: "still" in replica.finger("shawn"))
        self.assertEqual(replica.finger("moshez"), "No such user\r\n")

    def test_a_replica_outlives_the_first_and_itself(self) -> None:
        first = self.first()
        replica = self.replica(first)
        first.set("moshez", "gone fishing")
        until(lambda: replica.finger("moshez") == "gone fishing\r\n")
        since = replica.finger("/W moshez")
        first.stop()
        replica.wait_for("Connection refused.*stays in force")
        self.assertEqual(replica.finger("moshez"), "gone fishing\r\n")
        replica.stop()
        replica.start()
        replica.wait_for("starting with the copy")
        self.assertEqual(replica.finger("/W moshez"), since)
        first.start()
        first.set("moshez", "back")
        until(lambda: replica.finger("moshez") == "back\r\n")

    def fake(
        self, *answers: bytes, wrap: Callable[..., Any] = lambda sock: sock
    ) -> tuple[fingerd.UrlSource, list[bytes]]:
        """A source whose server gives these answers, one to a connection; and its requests."""
        listener = self.keep(socket.create_server(("127.0.0.1", 0)))
        requests: list[bytes] = []

        def serve() -> None:
            with contextlib.suppress(OSError):  # the test is over
                for answer in answers:
                    with wrap(listener.accept()[0]) as sock:
                        requests.append(sock.recv(65536))
                        sock.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        self.addCleanup(thread.join, DEADLINE)
        self.addCleanup(listener.shutdown, socket.SHUT_RDWR)
        port = listener.getsockname()[1]
        return fingerd.UrlSource(f"http://127.0.0.1:{port}/a?b", self.folder() / "copy"), requests

    def test_it_asks_whether_the_list_has_changed(self) -> None:
        etag, date = b'ETag: "x"\r\n', b"Last-Modified: Sun, 09 Sep 2001 01:46:41 GMT\r\n"
        same = b"HTTP/1.1 304 Not Modified\r\n\r\n"
        newer = b"HTTP/1.1 304 Not Modified\r\nLast-Modified: Sun, 09 Sep 2001 01:46:42 GMT\r\n\r\n"
        source, requests = self.fake(
            ok(b"a: b\n", etag, date), same, newer, newer, ok(b"a: b\n"), ok(b"a: c\n")
        )
        first = source.read({}, at_once=True)
        self.assertEqual(first, fingerd.UsersFile({"a": "b"}, [], modified=1_000_000_000.0))
        self.assertIsNone(source.read(first.texts, at_once=False))
        again = first._replace(modified=1_000_000_001.0)
        self.assertEqual(source.read(first.texts, at_once=False), again)
        self.assertIsNone(source.read(first.texts, at_once=False))
        self.assertEqual(source.read(first.texts, at_once=True).texts, first.texts)
        self.assertEqual(source.read(first.texts, at_once=False).texts, {"a": "c"})
        conditions = [b'If-None-Match: "x"' in each for each in requests]
        self.assertEqual(conditions, [False, True, True, True, False, False])
        self.assertRegex(requests[0], rb"\AGET /a\?b HTTP/1\.1\r\nHost: 127\.0\.0\.1:\d+\r\n")

    def test_the_target_that_it_asks_for(self) -> None:
        for url, target in (
            ("http://h", "/"),
            ("http://h/http", "/http"),
            ("http://h//a?b=c?d#e", "//a?b=c?d"),
            ("http://h?a", "/?a"),
            ("https://s/x", "/x"),
        ):
            with mock.patch("http.client.HTTPConnection") as http, self.subTest(url):
                with mock.patch("http.client.HTTPSConnection", http):
                    http.return_value.getresponse.return_value.read.return_value = b""
                    http.return_value.getresponse.return_value.length = 0
                    fingerd.http_get(url, {})
                self.assertEqual(http.return_value.request.call_args[0], ("GET", target))

    def test_what_is_no_list_is_an_error(self) -> None:
        moved = b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 5\r\n\r\na: b\n"
        rows = [
            (b"HTTP/1.1 304 Not Modified\r\n\r\n", "status 304"),
            (b"HTTP/1.1 206 Partial\r\n\r\na: b\n", "status 206"),
            (b"HTTP/1.1 404 Not Found\r\n\r\na: b\n", "status 404"),
            (ok(b"a: b\n", b"Content-Type: text/html\r\n"), "status 200, text/html, instead of"),
            (ok(b"<p>Hello!</p>\n"), "no list"),
            (ok(b"a: b\n", b"Content-Length: 30\r\n"), "broke off"),
            (
                ok(b'[{"user": "a", "status": "b", "since": "2026-11-25T12:00:00Z"},\n'),
                "incomplete",
            ),
            (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n\xff\n", "no list"),
            (b"220 mail.example.com ESMTP\r\n", "220 mail"),
            (b"", "closed"),
            (moved, "status 302, text/plain, instead of a list of users"),
        ]
        for answer, problem in rows:
            with self.subTest(answer):
                source, _ = self.fake(answer)
                with self.assertRaisesRegex(OSError, problem):
                    source.read({}, at_once=True)

    def test_times_in_the_future_are_not_believed(self) -> None:
        future = b"Last-Modified: Fri, 31 Dec 9999 23:59:59 GMT\r\n"
        for date in (future, b"Last-Modified: yesterday\r\n", b""):
            with self.subTest(date):
                source, _ = self.fake(ok(b"a: b\n", date))
                before = time.time()
                users = source.read({}, at_once=True)
                self.assertTrue(before <= users.modified <= time.time())

    def test_the_copy_is_private_and_follows_no_link(self) -> None:
        source, _ = self.fake(*[ok(b"a: b\n")] * 2)
        secret = source._copy.with_name("secret")
        secret.write_text("root: secret\n")
        for name in ("copy", "copy.new"):
            source._copy.with_name(name).symlink_to(secret)
        with mock.patch("os.fsync", wraps=os.fsync) as fsync:
            self.assertEqual(source.read({}, at_once=True).texts, {"a": "b"})
        fsync.assert_called_once()  # before it replaces the last one
        self.assertEqual(source._copy.lstat().st_mode, 0o100600)
        self.assertEqual(source._copy.read_text(), "a: b\n")
        self.assertEqual(secret.read_text(), "root: secret\n")
        source._copy.unlink()
        source._copy.symlink_to(secret)
        with self.assertRaises(OSError):
            fingerd.UrlSource("http://127.0.0.1:1/", source._copy).read({}, at_once=True)

    def test_no_proxy_is_asked(self) -> None:
        source, _ = self.fake(ok(b"a: b\n"))
        with mock.patch.dict(os.environ, http_proxy="http://127.0.0.1:1/"):
            self.assertEqual(source.read({}, at_once=True).texts, {"a": "b"})

    def trickles(self, wrap: Callable[..., Any], url: str) -> None:
        """Read from a server that sends each answer to the connection in `wrap` without an end."""
        rows = [
            (b"HTTP/1.0 200 OK\r\n", b"X: y\r\n"),
            (b"HTTP/1.0 200 OK\r\n\r\n", b"a: b\n"),
            (b"", b"H"),
            (b"", b""),
            (ok(b"", b"Content-Length: 999999\r\n"), b"a: b\n"),
            (ok(b"", b"Transfer-Encoding: chunked\r\n").replace(b"1.0", b"1.1"), b"1\r\na\r\n"),
        ]
        self.patch(FETCH_SECONDS=0.5)
        closed: list[tuple[bytes, bytes]] = []

        def serve() -> None:
            for start, more in rows:
                with wrap(listener.accept()[0]) as sock, contextlib.suppress(OSError):
                    sock.sendall(start)
                    while more or sock.recv(65536):  # each recv of the client's is in time
                        sock.sendall(more)
                        time.sleep(0.05)
                closed.append((start, more))

        listener = self.keep(socket.create_server(("127.0.0.1", 0)))
        threading.Thread(target=serve, daemon=True).start()
        source = fingerd.UrlSource(url % listener.getsockname()[1], None)
        threads = threading.active_count()
        for row in rows:
            with self.subTest(row), self.assertRaisesRegex(OSError, "timed out"):
                source.read({}, at_once=True)
            until(lambda wanted=row: wanted in closed)
        until(lambda: threading.active_count() <= threads)

    def test_a_first_that_trickles_leaves_nothing_behind(self) -> None:
        self.trickles(lambda sock: sock, "http://127.0.0.1:%d/")

    def test_a_first_that_trickles_by_tls_leaves_nothing_behind(self) -> None:
        self.trickles(self.by_tls(), "https://localhost:%d/")

    def by_tls(self) -> Callable[[socket.socket], socket.socket]:
        """A function that gives a connection TLS, with a certificate that this process trusts."""
        import ssl

        certificate, _ = make_certificate(self.folder())
        trust = mock.patch.dict(os.environ, SSL_CERT_FILE=str(certificate))
        trust.start()
        self.addCleanup(trust.stop)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        return lambda sock: context.wrap_socket(sock, server_side=True)

    def test_a_first_may_be_slow_and_keep_the_connection(self) -> None:
        self.patch(FETCH_SECONDS=3.0)
        listener = self.keep(socket.create_server(("127.0.0.1", 0)))
        read = threading.Event()

        def serve() -> None:
            with listener.accept()[0] as sock:
                time.sleep(1.6)  # the first byte may take more than half of the time
                sock.sendall(ok(b"a: b\n", b"Content-Length: 5\r\n"))
                read.wait(DEADLINE)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        self.addCleanup(thread.join, DEADLINE)
        self.addCleanup(read.set)
        source = fingerd.UrlSource(f"http://127.0.0.1:{listener.getsockname()[1]}/", None)
        self.assertEqual(source.read({}, at_once=True).texts, {"a": "b"})
        self.assertFalse(read.is_set(), "it does not wait for the end of the connection")

    def test_a_private_first_has_no_list_to_copy(self) -> None:
        self.refuses_to_start(command(self.url(self.first("--private"))), "403")

    def test_a_url_may_be_https(self) -> None:
        source, requests = self.fake(ok(b"a: b\n"), wrap=self.by_tls())
        source.name = source.name.replace("http://127.0.0.1", "https://localhost")
        self.assertEqual(source.read({}, at_once=True).texts, {"a": "b"})
        self.assertRegex(requests[0], rb"\AGET /a\?b HTTP/1\.1\r\nHost: localhost:\d+\r\n")

    def test_a_url_without_a_server_is_an_error(self) -> None:
        for url in ("http://me@127.0.0.1/", "http://[::1/", "https://127.0.0.1:x/"):
            with self.subTest(url), self.assertRaisesRegex(OSError, re.escape(url)):
                fingerd.UrlSource(url, None).read({}, at_once=True)

    def behind_haproxy(self) -> tuple[Service, Service, dict[str, int]]:
        """A first, its replica, and the ports of the README's HAProxy in front of them."""
        first = self.first()
        finger, web = first.port("finger"), first.port("web")
        second = self.replica(
            first, "--finger", f"127.0.0.2:{finger}", "--setter", "off", "--web", f"127.0.0.2:{web}"
        )
        ports = {"79": free_port(), "80": free_port(), "7979": finger, "8000": web}
        config = re.search(r"^defaults\n.*?(?=^```)", README, re.M | re.S)
        assert config
        text = re.sub(r":(\d+)\b", lambda match: f":{ports[match[1]]}", config[0])
        path = first.folder / "haproxy.cfg"
        path.write_text(text.replace("bind :", "bind 127.0.0.1:"))
        haproxy = [shutil.which("haproxy", path=PATH), "-db", "-f", path]
        proxy = subprocess.Popen(haproxy, stderr=subprocess.DEVNULL)
        self.addCleanup(proxy.wait)
        self.addCleanup(proxy.kill)
        until(lambda: not refused(ports["79"]) and not refused(ports["80"]))
        return first, second, ports

    def catches_up(self, first: Service, second: Service) -> None:
        """Set a message, and return once both have it and all its times."""
        first.set("moshez", "gone fishing")
        until(lambda: second.get("/", host="127.0.0.2")[1:] == first.get("/")[1:])

    @needs("haproxy")
    def test_behind_haproxy_nobody_notices_that_one_is_killed(self) -> None:
        first, second, ports = self.behind_haproxy()

        def asked() -> None:
            self.assertEqual(ask(ports["79"], b"moshez\r\n"), b"gone fishing\r\n")
            page = ask(ports["80"], b"GET /moshez?format=text HTTP/1.0\r\n\r\n", half_close=False)
            self.assertRegex(page, rb"\AHTTP/1.[01] 200 OK\r\n[^\0]*\r\n\r\ngone fishing\n\Z")

        self.catches_up(first, second)
        for _ in range(20):
            asked()
        first.kill()
        for _ in range(100):
            asked()

    @needs("haproxy")
    def test_behind_haproxy_a_page_that_is_known_is_not_sent_again(self) -> None:
        first, second, ports = self.behind_haproxy()
        self.catches_up(first, second)
        for target in ("/", "/?format=json", "/?format=atom", "/moshez", "/moshez?format=atom"):
            etag = fetch(ports["80"], target).headers["etag"]
            known = f"If-None-Match: {etag}"
            got = [fetch(ports["80"], target, known, "Connection: close") for _ in range(10)]
            self.assertEqual([page.status for page in got], [304] * 10, target)

    @needs("haproxy")
    def test_behind_haproxy_one_that_hangs_is_not_asked(self) -> None:
        first, second, ports = self.behind_haproxy()
        self.catches_up(first, second)
        first.signal(signal.SIGSTOP)

        def answers() -> bool:
            with contextlib.suppress(OSError), connect(ports["79"], b"moshez\r\n") as sock:
                sock.settimeout(0.5)
                return read_all(sock) == b"gone fishing\r\n"
            return False

        until(lambda: all(answers() for _ in range(10)), "it is taken out")
        first.signal(signal.SIGCONT)
        self.assertFalse([line for line in second.log if re.search("(finger|web): ", line)])


# ---- odd surroundings --------------------------------------------------------------------------


JOURNAL = """import os, runpy, sys
status = os.fstat(2)
os.environ["JOURNAL_STREAM"] = f"{status.st_dev}:{status.st_ino}"
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")"""


class SurroundingsTest(Case):
    """The same answers, wherever and however it is started."""

    def test_all_servers_work_without_a_warning(self) -> None:
        c_locale = {"PATH": "/bin", "LC_ALL": "C"}
        strict = {"PYTHONDEVMODE": "1", "PYTHONWARNINGS": "error"}
        as_it_is = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        for title, flags, popen in (
            ("every warning an error", ("-X", "dev", "-W", "error", "-bb"), {}),
            ("no site packages, no environment", ("-S", "-I"), {}),
            ("the C locale", (), {"env": {**c_locale, **strict}}),
            ("the C locale as it is", (), {"env": {**c_locale, **as_it_is}}),
            ("a folder that cannot be written", (), {"cwd": "/proc"}),
        ):
            with self.subTest(title):
                more = {"program": (sys.executable, *flags, str(FINGERD)), **popen}
                service = self.launch("zoé: At the café ☕\n", "--interval", "0.1", **more)
                self.assertEqual(service.finger("zoé"), "At the café ☕\r\n")
                put(service.users, "zoé: edited\noops\n")
                until(lambda s=service: s.finger("zoé") == "edited\r\n")
                service.wait_for("users:2: no colon")
                self.assertEqual(service.set("zoé", "bientôt"), "OK\r\n")
                for target in ("/", "/zoé", "/?format=atom"):
                    self.assertIn("bientôt", service.get(target).body.decode())
                self.assertEqual(service.get("/zo%C3%A9?format=text").body, "bientôt\n".encode())
                self.assertIn("bient&#244;t</string>", service.rpc(call("getUser", "zoé")))
                self.assertEqual(service.stop(), 0)
                self.assertEqual(len(service.complaints()), 1, service.complaints())

    def test_without_ipv6(self) -> None:
        without = mock.patch("socket.has_dualstack_ipv6", return_value=False)
        with without, fingerd.listen("finger", "0") as listener:
            self.assertEqual(listener.family, socket.AF_INET)

    @unittest.skipUnless(socket.has_dualstack_ipv6(), "without IPv6")
    def test_with_ipv6(self) -> None:
        service = self.launch(USERS, "--finger", "0", "--web", "[::1]:0")
        port = service.port("finger")
        for host in ("127.0.0.1", "::1"):
            self.assertEqual(ask(port, b"moshez\r\n", host=host), HAPPY)
            self.assertEqual(ask(port, f"moshez@[{host}]".encode(), host=host)[:5], b"Happy")
        self.assertEqual(service.get(method="HEAD", host="::1").status, 200)

    def test_import_leaves_the_library_as_it_was(self) -> None:
        code = """if True:
            import gc, sys
            sys.path.insert(0, sys.argv[1])
            before = list(sys.path), gc.isenabled(), gc.get_freeze_count()
            import fingerd
            assert before == (sys.path, gc.isenabled(), gc.get_freeze_count())
            import http.client, http.server, xmlrpc.client, xmlrpc.server
            handler = http.server.BaseHTTPRequestHandler.__new__(http.server.BaseHTTPRequestHandler)
            assert handler.date_time_string(0) == "Thu, 01 Jan 1970 00:00:00 GMT"
            dispatcher = xmlrpc.server.SimpleXMLRPCDispatcher()
            dispatcher.register_introspection_functions()
            assert "system.listMethods()" in dispatcher.system_methodHelp("system.listMethods")
            try:
                xmlrpc.client.ServerProxy("http://127.0.0.1:1").x()
            except ConnectionRefusedError:
                print("unchanged")
        """
        words = [sys.executable, "-I", "-S", "-c", code, str(HERE)]
        self.assertEqual(run(words), (0, ["unchanged"], []))

    def test_a_module_beside_the_script_does_not_run(self) -> None:
        folder = self.folder()
        folder.chmod(0o1777)
        program = (sys.executable, shutil.copy(FINGERD, folder))
        for name in ("argparse", "encodings", "idna", "linecache", "logging", "stat", "tokenize"):
            (folder / f"{name}.py").write_text("raise SystemExit('planted')\n")
        self.assertEqual(run([*program, "--version"])[0], 0)
        service = self.launch(program=program)
        self.assertEqual(service.rpc(call("x")).count("<fault>"), 1)
        self.assertEqual((service.stop(), service.complaints()), (0, []))

    def test_a_full_stderr_stops_nobody(self) -> None:
        ports, users = [free_port() for _ in FACES], self.folder() / "users"
        put(users, USERS)
        addresses = [(f"--{name}", f"127.0.0.1:{port}") for name, port in zip(FACES, ports)]
        words = command(users, "-v", *itertools.chain(*addresses))
        process = subprocess.Popen(words, stderr=subprocess.PIPE)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        with process.stderr:
            self.assertTrue(any(line.endswith(b" ready\n") for line in process.stderr))
            for _ in range(1_500):  # more lines than fit into the pipe
                self.assertEqual(ask(ports[0], b"moshez\r\n"), HAPPY)
            self.assertEqual(ask(ports[1], b"moshez\nset\n"), b"OK\r\n")
            self.assertEqual(fetch(ports[2]).status, 200)
            process.terminate()
            self.assertEqual(process.wait(DEADLINE), 0)
            self.assertNotIn(b"stopped", process.stderr.read())

    def test_a_closed_stderr_stops_nobody(self) -> None:
        port, shell = free_port(), ("sh", "-c", 'exec "$@" 2>&-', "sh", *PROGRAM)
        folder = self.folder()
        put(folder / "users", USERS)
        words = command(folder / "users", "--finger", f"127.0.0.1:{port}", program=shell)
        process = subprocess.Popen(words)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        until(lambda: not refused(port))
        self.assertEqual(ask(port, b"moshez\r\n"), HAPPY)
        process.terminate()
        self.assertEqual(process.wait(DEADLINE), 0)

    def test_lines_for_the_journal_carry_a_priority_and_no_time(self) -> None:
        service = self.launch("oops\n", program=(sys.executable, "-c", JOURNAL, str(FINGERD)))
        self.assertRegex(service.log[-1], "^<6>ready$")
        self.assertIn("<4>", "".join(line for line in service.log if "no colon" in line))
        record = logging.makeLogRecord({"levelname": "ERROR", "msg": "one\ntwo"})
        self.assertEqual(fingerd.JournalFormatter().format(record), "<3>one\n<3>two")
        program = (sys.executable, "-c", JOURNAL, str(FINGERD))
        words = command("/nowhere", program=program)
        self.assertRegex(run(words)[2][-1], "<3>fingerd: /nowhere: No such")

    def test_dropped_log_lines_are_counted(self) -> None:
        self.patch(LOG_LINES=10)
        reader, writer = os.pipe()
        with open(reader) as lines, open(writer, "w") as stream:
            handler = fingerd.LogWriter(stream.fileno())
            log = logging.Logger("full")
            log.addHandler(handler)
            log.info("x" * 1_000_000)  # more than the pipe holds
            self.assertTrue(select.select([reader], [], [], DEADLINE)[0])
            for n in range(15):
                log.info("line %d", n)
            self.assertEqual(len(lines.readline()), 1_000_001)
            self.assertEqual([lines.readline() for _ in range(10)][9], "line 9\n")
            log.info("the next")
            self.assertEqual(lines.readline(), "the next (5 lines before this one were dropped)\n")
            handler.close()

    def test_the_flood_filter_does_not_depend_on_the_wall_clock(self) -> None:
        keep, now = fingerd.FloodFilter().filter, time.monotonic()

        def kept(created: float, seconds: float, account: str = "") -> int:
            with mock.patch("time.monotonic", return_value=now + seconds):
                record = {"levelno": logging.INFO, "msg": "bad", "created": created}
                record["account"] = account
                return sum(keep(logging.makeLogRecord(record)) for _ in range(200))

        self.assertEqual(kept(time.time() + 1e8, 0), fingerd.FLOOD_LINES)
        self.assertEqual(kept(time.time(), 1), 0)
        self.assertEqual(kept(time.time(), 2, "moshez"), fingerd.FLOOD_LINES)
        self.assertEqual(kept(time.time(), fingerd.FLOOD_SECONDS), fingerd.FLOOD_LINES)


# ---- the rest of the top level -----------------------------------------------------------------


def commands(block: str) -> list[tuple[str, str]]:
    """The commands after `$ ` in a block of the README, and what each is said to print."""
    found: list[tuple[str, str]] = []
    for words, answer in re.findall(r"^\$ (.*\n)((?:(?!\$ ).*\n)*)", block, re.M):
        while words.count('"') % 2:  # it goes on to the line that closes the quotation
            line, _, answer = answer.partition("\n")
            words += f"{line}\n"
        found.append((words.rstrip("\n"), answer))
    return found


def without_times(text: str) -> str:
    """`text` with a T for each time."""
    return re.sub(TIME, "T", text).rstrip("\n")


TIME = r"\d{4}-?\d\d-?\d\d[ T][\d:]+(,\d+)?"
BLOCKS = re.findall(r"^```\n(.*?)^```$", README, re.M | re.S)


class ReadmeTest(Case):
    """What the README shows is what happens, on other ports."""

    def setUp(self) -> None:
        self.at = self.folder()
        for name in ("fingerd.py", "users.example", "Makefile"):
            shutil.copy2(HERE / name, self.at)
        self.irc = self.keep(socket.create_server(("127.0.0.1", 0)))
        self.irc.settimeout(DEADLINE)
        irc_port = self.irc.getsockname()[1]
        self.replacements = {
            **{port: str(free_port()) for port in ("7979", "1079", "8000")},
            "127.0.0.1 --irc-plaintext": f"127.0.0.1:{irc_port} --irc-plaintext",
            "finger moshez@localhost": "echo moshez | nc localhost 7979",
        }

    def adapted(self, text: str) -> str:
        """`text` with our ports."""
        for old, new in reversed(self.replacements.items()):
            text = text.replace(old, new)
        return text

    def runs(self, words: str, answer: str) -> None:
        """Run a command that ends by itself; checks what it prints."""
        words = re.sub("^python3", sys.executable, words)
        _, out, err = run(["sh", "-c", words], cwd=self.at)
        self.assertEqual(without_times("\n".join(out)), without_times(answer), (words, err))

    def serves(self, words: str, answer: str) -> subprocess.Popen[str]:
        """Start a server; checks that it logs the answer's lines up to `ready`."""
        words = re.sub("^python3", f"exec {sys.executable}", words)
        more: Any = {"stderr": subprocess.PIPE, "text": True, "cwd": self.at}
        process: Any = subprocess.Popen(["sh", "-c", words], **more)
        self.addCleanup(process.stderr.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        begin, ready, _ = answer.partition("INFO ready\n")
        said = ""
        while not said.endswith(ready):
            line = process.stderr.readline() or self.fail(said)
            said += "" if "the open files allow" in line else line  # as it is on few machines
        self.assertEqual(without_times(said), without_times(begin + ready))
        return process

    def talks(self, process: Any, answer: str, chat: str) -> None:
        """Let the bot have the conversation `chat`; checks it, and the rest of the bot's log."""
        end = self.keep(IrcEnd(self.irc.accept()[0]))
        end.register().hear("JOIN #team")
        end.say(":fingerbot!~fingerd@host JOIN #team")
        logged = answer.partition("INFO ready\n")[2]
        said = "".join(process.stderr.readline() for _ in logged.splitlines())
        self.assertEqual(without_times(said), without_times(logged))
        for channel, speaker, text in re.findall("^(?:(#.*) )?<(.*)> (.*)$", chat, re.M):
            if speaker == "ann":
                end.say(f":ann!ann@host PRIVMSG {channel or 'fingerbot'} :{text}")
                continue
            if "Giving" in text:
                message = text.replace(": ", "\n", 1) + "\n"
                ask(int(self.replacements["1079"]), message.encode())
            self.assertEqual(end.hear("PRIVMSG"), f"PRIVMSG {channel or 'ann'} :{text}")

    @needs("curl", "make", "nc")
    def test_the_readmes_transcript_is_true(self) -> None:
        first, *tour = [block for block in BLOCKS if block.startswith("$ ")]
        typed = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        _, recipe, _ = run(["make", "-n", "run"], cwd=self.at, env=typed)  # not by `make test`
        server: Any = None
        (chat,) = [block for block in BLOCKS if block.startswith("<ann>")]
        blocks = [*tour[:3], first, *tour[3:]]  # moshez has no message then
        for words, answer in itertools.chain(*map(commands, blocks)):
            with self.subTest(words):
                if words == "make run":
                    words = "\n".join(recipe)
                    self.assertEqual(answer[: len(words)], words)
                    answer = answer[len(words) + 1 :]
                words, answer = self.adapted(words), self.adapted(answer)
                if not words.startswith("python3 fingerd.py"):
                    self.runs(words, answer)
                    continue
                if server:
                    server.terminate()
                    server.wait()
                server = self.serves(words, answer)
                if "--irc" in words:
                    self.talks(server, answer, chat)

    def test_the_readme_has_the_help(self) -> None:
        def plain(text: str) -> str:  # as each Python lays it out
            return " ".join(text.replace("optional arguments:", "options:").split())

        _, out, _ = run([*PROGRAM, "--help"], env={**os.environ, "COLUMNS": "80"})
        self.assertIn(plain("\n".join(out)), [plain(block) for block in BLOCKS])


class TopLevelTest(Case):
    """Makefile, users.example."""

    @unittest.skipUnless(shutil.which("make"), "without make")
    def test_make_install_and_uninstall(self) -> None:
        root = self.folder()
        make = ["make", "-s", f"DESTDIR={root}"]
        self.assertEqual(run([*make, "install"], cwd=HERE)[0], 0)
        self.assertTrue(os.access(root / "usr/local/bin/fingerd", os.X_OK))
        self.assertEqual(run([*PROGRAM, "--check", str(root / "etc/users")])[0], 0)
        (root / "etc/users").write_text("kept: x\n")
        self.assertEqual(run([*make, "install"], cwd=HERE)[0], 0)
        self.assertEqual(run([*make, "uninstall"], cwd=HERE)[0], 0)
        files = [path for path in root.rglob("*") if path.is_file()]
        self.assertEqual(files, [root / "etc/users"])
        self.assertEqual(files[0].read_text(), "kept: x\n")

    @needs("make", "systemd-analyze")
    def test_systemd_accepts_the_units(self) -> None:
        prefix = self.folder()
        words = ["make", "-s", "install", f"PREFIX={prefix}", f"USERS={prefix}/users"]
        self.assertEqual(run([*words, "LIVE=false"], cwd=HERE)[0], 0)  # leave this machine's alone
        units = sorted(map(str, (prefix / "lib/systemd/system").iterdir()))
        self.assertEqual(len(units), 4)
        self.assertEqual(run(["systemd-analyze", "verify", "--man=no", *units]), (0, [], []))
        service = f"{prefix}/lib/systemd/system/fingerd.service"
        _, out, _ = run(["systemd-analyze", "security", "--offline=true", service])
        exposure = re.search(r"exposure level .*: ([\d.]+)", "\n".join(out))
        assert exposure
        self.assertLessEqual(float(exposure[1]), 1.5)


NSPAWN = """systemd-nspawn --quiet --directory=/ --volatile=yes --private-network --register=no
--keep-unit --console=pipe"""
LOAD = r"""
import collections, socket, sys, threading
web = b"GET / HTTP/1.0\r\n\r\n", b"200 OK"
servers = {79: (b"a\r\n", b"\r\n"), 1079: (b"a\nb\n", b"OK"), 8000: web}
counts, over = collections.Counter(), threading.Event()
def client(port, query, wanted):
    while not over.is_set():
        try:
            with socket.create_connection(("127.0.0.1", port), 20) as sock:
                sock.sendall(query)
                answer = b"".join(iter(lambda: sock.recv(65536), b""))
                counts[wanted in answer, port] += 1
        except OSError as problem:
            counts[str(problem), port] += 1
threads = [threading.Thread(target=client, args=(p, *q)) for p, q in [*servers.items()] * 2]
for thread in threads: thread.start()
sys.stdin.read()
over.set()
for thread in threads: thread.join()
print(*(f"{port}:{what}" for what, port in sorted(counts, key=str)))
"""


@unittest.skipUnless(ROOT, "needs root")
@needs("systemd-nspawn", "nsenter", "make")
class SystemdTest(Case):
    """The units in a container with a systemd of its own, and this machine's /usr."""

    def enter(self, *words: str) -> list[str]:
        """How to run a command in the container's network."""
        return ["nsenter", f"--target={self.leader}", "--net", *words]

    def inside(self, words: str) -> tuple[int, list[str], list[str]]:
        """As `run`, inside the container."""
        namespaces = ("--mount", "--pid", "--ipc", "--uts", "--wd=/", "sh", "-c", words)
        return run(self.enter(*namespaces), env={"PATH": "/usr/bin:/usr/sbin"})

    def setUp(self) -> None:
        process = subprocess.Popen(
            [*NSPAWN.split(), f"--bind-ro={HERE}:/src", "--boot", "systemd.unit=basic.target"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.addCleanup(process.wait)
        self.addCleanup(process.terminate)
        children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")

        def has_booted() -> bool:
            if process.poll() is not None:
                self.skipTest("no container can be started here")
            self.leader = children.read_text().strip()
            return bool(self.leader) and not self.inside("systemctl is-active basic.target")[0]

        try:
            until(has_booted)
        except AssertionError:
            self.skipTest("no systemd can be started here")
        code = "import socket; s = socket.create_server(('127.0.0.1', 0)); "
        code += "socket.create_connection(s.getsockname())"
        if self.inside(f'python3 -c "{code}"')[0]:
            self.skipTest("no python3 in /usr, or no loopback network in the container")

    def test_installed_enabled_restarted_uninstalled(self) -> None:
        make = "make -s -C /src PREFIX=/opt UNITS=/etc/systemd/system "
        self.assertEqual(self.inside(make + "install")[0], 0)
        self.assertEqual(self.inside("systemctl enable --now fingerd.service")[0], 0)
        code = "import socket; s = socket.create_connection(('127.0.0.1', 1079)); "
        code += "s.sendall(b'guest\\\\nhi\\\\n'); print(s.recv(99))"
        self.assertIn("OK", self.inside(f'python3 -c "{code}"')[1][0])
        found = "journalctl -u fingerd | grep \"'guest' set by root\""
        until(lambda: not self.inside(found)[0])
        words = self.enter(sys.executable, "-c", LOAD)
        load = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.addCleanup(load.kill)
        for _ in range(7):
            self.assertEqual(self.inside("systemctl restart fingerd.service")[0], 0)
        out, _ = load.communicate(timeout=DEADLINE)
        self.assertEqual(out.decode().split(), ["1079:True", "79:True", "8000:True"])
        status = self.inside("cat /proc/$(systemctl show -P MainPID fingerd)/status")[1]
        for line in ("NoNewPrivs:\t1", "CapEff:\t" + "0" * 16, "CapBnd:\t" + "0" * 16):
            self.assertIn(line, status)
        self.assertEqual(self.inside(make + "uninstall")[0], 0)
        self.assertEqual(self.inside("systemctl list-units --no-legend 'fingerd*'")[1], [])
        self.assertEqual(self.inside("ls -d /opt/bin/* /etc/users")[1], ["/etc/users"])


# ================================================================================================
# 12. running: the bench, and all tests side by side
# ================================================================================================

LOOP = """
import socket, sys
with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
    print(listener.getsockname()[1], flush=True)
    while True:
        peer, _ = listener.accept()
        peer.recv(65536)
        peer.sendall(%r)
        peer.close()
"""


def processor(pid: int) -> float:
    """Seconds of processor time that a process has used; 0 where /proc cannot tell."""
    with contextlib.suppress(OSError):
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def measure(pid: int, port: int, query: bytes, count: int) -> tuple[float, float]:
    """Answers a second and microseconds of CPU per answer; a wrong answer ends the bench."""
    before, began = processor(pid), time.monotonic()
    for _ in range(count):
        answer = ask(port, query, half_close=False)
        if b"Happy and well" not in answer:
            raise SystemExit(f"wrong answer: {answer!r}")
    seconds = time.monotonic() - began
    return count / seconds, (processor(pid) - before) / count * 1e6


def measure_kept(pid: int, port: int, query: bytes, count: int) -> tuple[float, float]:
    """As `measure`, with all queries over one connection."""
    before, began = processor(pid), time.monotonic()
    with connect(port) as sock, sock.makefile("rb") as file:
        for _ in range(count):
            sock.sendall(query)
            length = 0
            for line in iter(file.readline, b"\r\n"):
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split()[1])
            if b"Happy and well" not in file.read(length):
                raise SystemExit("wrong answer")
    seconds = time.monotonic() - began
    return count / seconds, (processor(pid) - before) / count * 1e6


def bench() -> None:
    """Print each server's figures beside those of the smallest loop that could give its answers."""
    count = int(os.environ.get("COUNT", "3000"))
    queries = {
        "finger": b"moshez\r\n",
        "web": request("/moshez", "Connection: close"),
        "XML-RPC": post(CALL, "Connection: close"),
    }
    print("server        answers/s      loop   ratio   CPU/answer      loop   ratio")
    with contextlib.closing(Service()) as service:
        for name, query in queries.items():
            port = service.port("finger" if name == "finger" else "web")
            words = [sys.executable, "-c", LOOP % ask(port, query, half_close=False)]
            with subprocess.Popen(words, stdout=subprocess.PIPE) as loop:
                both = (service.pid, port), (loop.pid, int(loop.stdout.readline()))
                rounds = [[measure(*where, query, count) for where in both] for _ in range(3)]
                loop.kill()
            (rate, cpu), (loop_rate, loop_cpu) = (
                map(statistics.median, zip(*figures)) for figures in zip(*rounds)
            )
            print(
                f"{name:12} {rate:10.0f} {loop_rate:9.0f} {rate / loop_rate:7.2f}"
                f" {cpu:9.1f} us {loop_cpu:6.1f} us {cpu / max(loop_cpu, 0.1):7.2f}"
            )
        port = service.port("web")
        for name, query in (("web kept", request("/moshez")), ("XML-RPC kept", post(CALL))):
            kept = [measure_kept(service.pid, port, query, count) for _ in range(3)]
            rate, cpu = map(statistics.median, zip(*kept))
            print(f"{name:12} {rate:10.0f} {'':17} {cpu:9.1f} us")


# ---- everything side by side -------------------------------------------------------------------


class Result(unittest.TextTestResult):
    """Counts the tests that passed, since some Pythons leave skipped ones out of `testsRun`.

    A test that hangs is shown by a traceback of its threads.
    """

    passed = 0

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        faulthandler.dump_traceback_later(HANG_SECONDS, repeat=True)

    def addSuccess(self, test: unittest.TestCase) -> None:
        super().addSuccess(test)
        self.passed += 1


def run_case(name: str) -> tuple[int, int, int, str]:
    """How many tests of a class passed, failed and were skipped, and the report if some failed."""
    output = io.StringIO()
    suite = unittest.defaultTestLoader.loadTestsFromName(f"test_fingerd.{name}")
    total = suite.countTestCases()
    faulthandler.dump_traceback_later(HANG_SECONDS, repeat=True)
    result: Any = unittest.TextTestRunner(output, verbosity=0, resultclass=Result).run(suite)
    faulthandler.cancel_dump_traceback_later()
    problems = [test for test, _ in result.failures + result.errors]
    failed = len({getattr(test, "test_case", test).id() for test in problems})  # not the subtests
    text = output.getvalue() if failed else ""
    return result.passed, failed, max(0, total - result.passed - failed), text


def run_all() -> int:
    """Run the test classes side by side, since most of what they do is wait; the exit status."""
    names = [
        name
        for name, value in globals().items()
        if isinstance(value, type)
        and issubclass(value, unittest.TestCase)
        and unittest.defaultTestLoader.getTestCaseNames(value)
    ]
    names.sort(key=lambda name: name not in SLOW)
    spawn = multiprocessing.get_context("spawn")
    passed = failed = skipped = 0
    with concurrent.futures.ProcessPoolExecutor(JOBS, mp_context=spawn) as pool:
        for figures in pool.map(run_case, names):
            passed, failed, skipped = passed + figures[0], failed + figures[1], skipped + figures[2]
            print(figures[3], end="", flush=True)
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


JOBS = int(os.environ.get("JOBS", "5"))
HANG_SECONDS = 120.0  # after which a test that still runs is shown, again and again
SLOW = ("InspircdTest", "HostileTest", "DurabilityTest", "ReplicasTest", "PrivilegesTest")


if __name__ == "__main__":
    sys.exit(bench() if sys.argv[1:] == ["bench"] else run_all())
