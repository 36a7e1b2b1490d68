#!/usr/bin/env python3
"""fingerd: a status line for each user, by finger, web, XML-RPC and IRC, from one users file.

    finger ──┐                               ┌── users file (Reloader: every 30 s and on SIGHUP)
    web ─────┼──► answers ──► StatusStore ◄──┤
    XML-RPC ─┤                     │         └── setter
    IRC ─────┘                     └──► StateFile (SQLite: messages outlive the process)

A `server` is the finger, the setter or the web server; a `client` has a `connection` to one. A
`message` is a text that was set for a user; a `status` is the text that is shown for a user: the
message, or else the text in the users file.

Six layers follow: text, codecs, store, answers, services and command line. A layer uses only the
layers above it. Except in annotations, a name is used only below its definition.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
    del sys.path[0]  # the script's directory: a module that somebody else put there must not run

try:
    import http.server
    import xmlrpc.server
except ModuleNotFoundError as problem:
    sys.exit(f"fingerd: {problem}; install all of Python (Debian: python3, not python3-minimal)")
import argparse
import base64
import collections
import contextlib
import datetime
import fcntl
import functools
import grp
import hashlib
import heapq
import html
import http.client
import io
import itertools
import json
import logging
import math
import os
import pathlib
import pwd
import queue
import re
import resource
import selectors
import shlex
import signal
import socket
import socketserver
import ssl
import stat
import struct
import threading
import time
import unicodedata
import urllib.parse
import xmlrpc.client
from concurrent.futures import Future
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple
from xmlrpc.client import Fault

try:
    import sqlite3
except ImportError:  # not every Python has it
    sqlite3 = None  # type: ignore[assignment]

__version__ = "1.0"

# ---- limits: all figures that somebody may want to look up or to change ------------------------

# What people and programs may send, and what they get at most.
MAX_NAME = 64  # characters of a user's name
MAX_STATUS = 1_000  # characters of a status
MAX_COMPOSED = 2_000  # characters of a text that is put into NFC, in 4 ms at the most
MAX_QUERY = 512  # bytes of a finger query, CR included (RFC 1288 sets no limit)
MAX_SETTING = 8_192  # bytes of the setter's two lines
MAX_AHEAD = 366 * 86_400.0  # seconds until a message is taken back
MAX_SKEW = 60.0  # seconds that the clock of a server whose list is read may be ahead
MAX_HTTP_HEAD, MAX_HEADERS = 16_384, 100  # bytes and headers of a request head
MAX_ACCEPT = 1_000  # characters of an Accept header that count; 16,000 would take 90 ms
MAX_BODY = 65_536  # bytes of a request body, with the sizes of its chunks
MAX_CHUNKS = 64  # of a request body; they are read again each time that bytes arrive
MAX_TRAILERS = 4_096  # bytes of the last chunk, with the headers behind it
MAX_LISTING = 100_000  # characters of a finger listing
MAX_LISTED = 1_000  # users on the web page, and in a finger listing
MAX_FEED = 50  # entries of a feed
MAX_PAGES = 256  # users' pages that are remembered, each of 20 kB at most
MAX_SHORT_LIST = 100  # users in a list that the loop makes itself; a longer list is a job
MAX_SHORT_CALL = 2_048  # bytes of an XML-RPC call that the loop parses; a longer one is a job
MAX_RPC_USERS = 10_000  # users in an answer to listUsers
MAX_MULTICALL = 100  # calls inside one system.multicall
MAX_PLAN, MAX_PLAN_LINES = 65_536, 1_000  # bytes and lines of a plan; the rest is cut off
PLAN_SECONDS = 0.4  # to read a plan, before the reply is sent without it

# The users file and the store.
MAX_FILE = 256 * 1024 * 1024  # bytes of a users file
MAX_FILE_LINE = 8_192  # bytes of one line in it
MAX_USERS = 2_000_000  # users in it
MAX_PROBLEMS = 100  # bad lines that are named
MAX_MESSAGES = 20_000  # users with a message of their own
MAX_DATED = 100_000  # users in the file, if the dates of their lines are kept over a restart
MAX_CHANGES = 100  # changes that the store remembers for announcements
SETTLE_SECONDS = 1.0  # a users file that was changed so recently may not be finished
FETCH_SECONDS = 10.0  # to get a users file from another server
LOCKED_SECONDS = 0.4  # for a state file that another program has locked

# Connections, for each server.
CONNECTIONS = 10_000  # at the same time; fewer if the process may not have as many descriptors
NEWCOMERS = 128  # accepted in one turn; more if more connections that waited are served in it
SPARE_DESCRIPTORS = 64  # for everything but connections
WORKERS = 16  # threads that compute replies; each may delay the loop by 0.1 ms
SEND_SECONDS = 10.0  # for a client to take a reply; each byte that it takes extends the time
SLOWEST_READER = 10_000  # bytes a second: a faster client is never cut off
HEAVY = 1_024  # connections with a long incomplete request; as many whose clients take no bytes
LIGHT_BYTES = 1_024  # of a request; a longer one is long
TAKE_SECONDS = 1.0  # a client that has taken bytes of its reply so recently is not one of these
LONG_JOBS = 64  # jobs of one network that wait; then its long requests are refused
DRAIN_SECONDS, DRAIN_BYTES = 1.0, 1_048_576  # for what a client sends after its last reply
RECEIVE_BYTES = 4_096  # received at once from a client
BLOCK_BYTES = 65_536  # read at once from another server; a longer page is not copied to its head
UNSENT_BYTES = 16_384  # that the kernel takes from a reply before the client is ready for them
TURNS_SECONDS = 0.1  # between checks for a shutdown and for connections whose deadline has passed
STOP_SECONDS = 2.0  # for the replies in flight when the service stops

# The process.
FLOOD_LINES, FLOOD_SECONDS = 120, 600.0  # log lines of one kind in this many seconds
LOG_LINES = 1_000  # that wait for stderr; more are dropped

# IRC.
IRC_TEXT_BYTES = 380  # of a text and its target; a line has 512 bytes, nick!user@host included
IRC_BURST_LINES, IRC_LINE_SECONDS = 5, 2.0  # lines sent at once; seconds for each further line
IRC_QUEUE_LINES = 20  # lines that wait to be sent, 40 s at most at that pace
IRC_QUERIES = 12  # answered to one user@host between two keep-alives
IRC_RECENT = 1_000  # queries of anybody that are remembered for this
IRC_ANNOUNCED = 3  # changes announced one by one; the rest of a burst is only counted
IRC_CONNECT_SECONDS = 15.0  # for each address, and for the TLS handshake
IRC_KEEP_ALIVE_SECONDS = 90.0  # for the registration; between PINGs; before another JOIN
IRC_RETRY_SECONDS, IRC_LONGEST_RETRY_SECONDS = 2.0, 600.0  # the back-off, doubled on each failure

NO_SUCH_USER = "No such user"
INTERNAL_ERROR = "Internal error in server"
RUN_AS_HINT = ", see --run-as" if os.geteuid() == 0 else ""  # only root can change its user

log = logging.getLogger("fingerd")

# ================================================================================================
# 1. text: input from outside becomes one printable line, once, when it is parsed
# ================================================================================================

UNPRINTABLE = (
    "[\x00-\x1f\x7f-\x9f"  # C0, DEL, C1
    "\u2028\u2029"  # line and paragraph separators
    "\u202a-\u202e\u2066-\u2069"  # bidirectional embeddings, overrides and isolates
    "\u00ad\u180e\u200b\u2060-\u2064\ufeff"  # invisible characters, the byte order mark included
    "\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"  # lone surrogates, noncharacters
)


def clean(text: str | bytes) -> str:
    """`text` as one printable line without blanks at its ends, fit for a terminal, IRC and XML.

    U+FFFD stands for bytes that are not UTF-8. The line is in NFC unless it is longer than
    MAX_COMPOSED: combining marks take quadratic time.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    if not text.isprintable():
        text = re.sub(UNPRINTABLE, "", text.replace("\t", " "))
    if len(text) <= MAX_COMPOSED:
        text = unicodedata.normalize("NFC", text)
    return text.strip()


def entry_problem(name: str, text: str = "") -> str:
    """The reason why a user cannot have this name and the status `text`, or "" if there is none."""
    if not name:
        return "no name"
    if len(name) > MAX_NAME:
        return f"the name is longer than {MAX_NAME} characters"
    if ":" in name or "@" in name or name[0] in "/#" or name in (".", ".."):
        return "a name holds no ':' or '@', does not begin with '/' or '#', and is not '.' or '..'"
    if "\ufffd" in name:
        return "the name is not UTF-8"
    return f"the status is longer than {MAX_STATUS} characters" if len(text) > MAX_STATUS else ""


# ================================================================================================
# 2. codecs: functions between bytes and values, without side effects; few can raise
# ================================================================================================

# ---- the users file ----------------------------------------------------------------------------


class UsersFile(NamedTuple):
    """The content of a users file."""

    texts: dict[str, str]
    problems: list[str]  # `LINE: reason` of the first MAX_PROBLEMS, and a line if there are more
    repeated: list[str] = []  # `LINE: reason` of lines that replace others; MAX_PROBLEMS at most
    modified: float = 0.0  # seconds since 1970
    dates: dict[str, float] | None = None  # since when; None if the file has no times
    ends: dict[str, float] = {}  # until when, for those that will be taken back


def clean_line(raw: bytes) -> tuple[str, str]:
    """A line of the file, cleaned, and ""; or "" and the problem with the line."""
    if len(raw) > MAX_FILE_LINE:
        return "", f"the line is longer than {MAX_FILE_LINE} bytes"
    try:
        line = raw.decode("utf-8").strip()
    except UnicodeDecodeError:
        return "", "not UTF-8"
    return line if line.isascii() and line.isprintable() else clean(line), ""


def parse_users(lines: Iterable[tuple[str, str]], known: Mapping[str, str]) -> UsersFile:
    """The users in lines of `clean_line`; the last one for a user counts, a bad one is skipped.

    A status that is already in `known` is reused as the same object, so that reading a large file
    again costs little memory. Reading stops after MAX_USERS + 1 users; `read_users` refuses these.
    """
    texts: dict[str, str] = {}
    problems: list[str] = []
    repeated: list[str] = []
    for number, (line, problem) in enumerate(lines, 1):
        name, colon, text = line.partition(":")
        name, text = name.rstrip(), text.lstrip()
        if not problem and (not line or line[0] == "#"):
            continue
        problem = problem or (entry_problem(name, text) if colon else "no colon")
        if problem:
            if len(problems) <= MAX_PROBLEMS:
                problems.append(f"{number}: {problem}")
            continue
        if name in texts and len(repeated) < MAX_PROBLEMS:
            repeated.append(f"{number}: replaces an earlier line for {name}")
        old = known.get(name, "")
        texts[name] = old if old == text else text
        if len(texts) > MAX_USERS:
            break
    if len(problems) > MAX_PROBLEMS:
        problems[-1] = " ... and more bad lines"
    return UsersFile(texts, problems, repeated)


# ---- finger (RFC 1288) -------------------------------------------------------------------------


class FingerQuery(NamedTuple):
    """One query: `user` is "" if it asks for everybody; `host` is None if it names no host."""

    user: str = ""
    long: bool = False  # asked with /W
    host: str | None = None
    too_long: bool = False


_TELNET_OPTION = re.compile(rb"\xff[\xfb-\xfe].")  # some clients send these first
_LONG = re.compile("(?:^| )/W(?= |$)", re.IGNORECASE)


@functools.lru_cache(maxsize=256)  # 1 MB at the most; without it, an answer takes 5 % longer
def parse_finger(data: bytes, ended: bool) -> FingerQuery | None:
    """The query in what a client has sent so far, or None while its line has not ended."""
    line, newline, _ = data.partition(b"\n")
    if len(line) > MAX_QUERY:
        return FingerQuery(too_long=True)
    if not newline and not ended:
        return None
    words, is_long = _LONG.subn("", clean(_TELNET_OPTION.sub(b"", line)))
    user, at, host = words.partition("@")
    return FingerQuery(user.strip(), is_long > 0, host.strip() if at else None)


def parse_plan(data: bytes) -> str:
    """The text of a file that begins with `data`: MAX_PLAN bytes and MAX_PLAN_LINES at most."""
    text = data[:MAX_PLAN].decode("utf-8", "replace").expandtabs()
    lines = text[:MAX_PLAN].splitlines()
    is_cut = max(len(data), len(text)) > MAX_PLAN or len(lines) > MAX_PLAN_LINES
    plan = [
        line[: len(line) - len(line.lstrip(" "))] + clean(line)  # the indentation is kept
        for line in lines[:MAX_PLAN_LINES]
    ]
    return "\n".join(plan + ["... (cut)"] * is_cut)


# ---- times -------------------------------------------------------------------------------------

PERIODS = {"m": 60, "h": 3_600, "d": 86_400, "w": 604_800}  # in seconds


def parse_time(words: str, now: float) -> float:
    """The time that `words` name, in seconds since 1970; may raise ValueError or OverflowError."""
    period = re.fullmatch("([0-9]{1,6})([mhdw])", words)
    if period:
        return now + int(period[1]) * PERIODS[period[2]]
    read, day = datetime.datetime.strptime, datetime.timedelta(days=1)
    if "-" in words and ":" in words:
        return read(words, "%Y-%m-%d %H:%M").timestamp()
    if "-" in words:
        return (read(words, "%Y-%m-%d") + day).timestamp()
    today = datetime.datetime.fromtimestamp(now)
    clock = read(words, "%H:%M")
    moment = today.replace(hour=clock.hour, minute=clock.minute, second=0, microsecond=0)
    return (moment if moment > today else moment + day).timestamp()


def end_of_message(words: str, now: float) -> tuple[float, str]:
    """The time that `words` name, in seconds since 1970, and ""; or why it cannot be used."""
    end, problem = 0.0, ""
    with contextlib.suppress(ValueError, OverflowError):
        end = parse_time(words, now)
    if not end:
        problem = "no such time"
    elif not now < end <= now + MAX_AHEAD:
        problem = "over a year away" if end > now else "the time has passed"
    forms = "write 30m, 2h, 3d, 1w, 14:00, 2026-12-24 or 2026-12-24 14:00"
    return end, problem and f"{problem}: {forms}"


def utc(when: float) -> datetime.datetime:
    """`when`, in seconds since 1970, as a date in UTC."""
    return datetime.datetime.fromtimestamp(when, datetime.timezone.utc)


def iso_time(when: float) -> str:
    """`when` as programs read it (RFC 3339): 2026-11-23T01:40:00Z."""
    return utc(when).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_iso_time(text: str) -> float:
    """The time in a text of iso_time; raises ValueError for any other text."""
    return datetime.datetime.fromisoformat(text.rstrip("Z") + "+00:00").timestamp()


def plain_time(when: float) -> str:
    """`when` as people read it: 2026-11-23 01:40 UTC."""
    return utc(when).strftime("%Y-%m-%d %H:%M UTC")


HTTP_TIME = "%a, %d %b %Y %H:%M:%S GMT"  # in English: no locale is set


@functools.lru_cache(maxsize=16)  # 16 short strings: each response has the Date
def http_time(second: int) -> str:
    """`second` (since 1970) as HTTP writes it (RFC 9110, section 5.6.7)."""
    return utc(second).strftime(HTTP_TIME)


def parse_http_time(text: str) -> float:
    """The second that `text` names; infinity if it is not a date as HTTP writes it today."""
    try:
        return datetime.datetime.strptime(f"{text} +0000", f"{HTTP_TIME} %z").timestamp()
    except ValueError:
        return math.inf


# ---- the setter's two lines --------------------------------------------------------------------

NOT_A_NAME = re.compile(  # a control character, or what a client of another protocol sends first
    rb".*([\0-\x08\x0b-\x1f\x7f]|\xc2[\x80-\x9f])|.*\bHTTP/[0-9]|\w+ +[/*]|SSH-[0-9]"
    rb"|220[ -]|(AUTH|EHLO|HELO|PASS|USER) .|CAP (LS|REQ)\b|(?-i:NICK|nick) ."  # not Nick Cave
    rb"|PROXY TCP[46] |<\?xml|\*[0-9]+$",
    re.IGNORECASE,
)


class Setting(NamedTuple):
    """A user and the new status, "" to take the message back; or the problem with them."""

    user: str
    text: str
    problem: str = ""
    until: float | None = None  # when to take it back; None for never


def parse_setting(data: bytes, ended: bool, now: float) -> Setting | None:
    """The setting in the bytes that a client has sent so far, or None if it is incomplete."""
    first, _, rest = data.partition(b"\n")
    second, complete, _ = rest.partition(b"\n")
    if len(first) > MAX_QUERY or len(first) + len(second) > MAX_SETTING:
        return Setting("", "", "too long")
    if not complete and not ended:
        return None
    user, colon, words = map(str.strip, clean(first).partition(":"))
    text, until = clean(second), None
    problem = entry_problem(user, text) if rest else "no status line"
    if NOT_A_NAME.match(first.strip(b" \t\r")):
        problem = "the first line belongs to another protocol"
    elif colon and not problem:
        until, problem = end_of_message(words, now)
    return Setting(user, text, problem, until if text else None)


# ---- HTTP/1.1 requests (RFC 9112) --------------------------------------------------------------
# They are read strictly: if a proxy and fingerd disagree about where a request ends, a client can
# hide a second request in the first. No answer depends on the host, in the target or in a header.


class HttpRequest(NamedTuple):
    """A request, or in `problem` the status (400 to 501) with which it is refused."""

    problem: int = 0
    size: int = 0  # bytes of the head, and of the body as soon as that is complete
    method: str = ""
    path: str = ""
    user: str = ""  # the whole path after its first "/", percent-decoded
    query: str = ""
    headers: Mapping[str, str] = {}  # names in lower case; repeated ones joined with ", "
    body: bytes | None = b""  # None while it is incomplete
    expects: bool = False  # whether the client waits for `100 Continue` before it sends the body
    keep: bool = False  # whether the connection stays open afterwards


HOST = r"(?:[0-9A-Za-z._-]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{0,5})?"
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_FIELD = rb"%s:[^\x00-\x08\x0a-\x1f\x7f]*" % _TOKEN
_PATH, _QUERY = rb"/[^\x00-\x20\x7f?#]*", rb"[^\x00-\x20\x7f#]*"
_REQUEST_LINE = re.compile(
    rb"[\r\n]*(%s) (?:(?i:https?)://%s)?(%s)(?:\?(%s))? HTTP/1\.([0-9])\r?\n"
    % (_TOKEN, HOST.encode(), _PATH, _QUERY)
)
_HEADERS = re.compile(rb"(?:%s\r?\n){0,%d}\r?\n" % (_FIELD, MAX_HEADERS))
_HEAD = re.compile(rb"[\r\n]*[^\r\n](?:[^\n]*\n)+?\r?\n")  # an extra line may follow a body
_EXTENSION = rb"[ \t]{0,64}(?:;[\t -~\x80-\xff]{0,256})?\r\n"
_CHUNK = re.compile(rb"\r\n([0-9A-Fa-f]{1,8})%s" % _EXTENSION)
_LAST_CHUNK = re.compile(rb"\r\n0{1,8}%s(?:%s\r\n)*\r\n" % (_EXTENSION, _FIELD))


def header_problem(headers: Mapping[str, str], http_1_1: bool) -> int:
    """The status that refuses a request with these headers, or 0."""
    host = headers.get("host", "missing!" if http_1_1 else "")  # no host has a "!"
    length = headers.get("content-length", "0")
    # A repeated header has a comma in its value, which neither pattern accepts.
    if (host and not re.fullmatch(HOST, host)) or not re.fullmatch("[0-9]{1,99}", length):
        return 400
    if "transfer-encoding" in headers:
        coding = headers["transfer-encoding"].lower()
        if not http_1_1 or "content-length" in headers or re.search("chunked[ \t]*,", coding):
            return 400
        if coding != "chunked":
            return 501
    return 413 if int(length) > MAX_BODY else 0


@functools.lru_cache(maxsize=128)  # 6 MB at the most; without it, a page takes 50 % longer
def parse_complete_head(head: bytes) -> HttpRequest:
    """The request with this head, which may follow empty lines; the body is not included."""
    line = _REQUEST_LINE.match(head)
    if not (line and _HEADERS.fullmatch(head, line.end())):
        return HttpRequest(400)
    method, path, query, minor = (part.decode("latin-1") for part in line.groups(b""))
    headers: dict[str, str] = {}
    for field in head[line.end() :].decode("latin-1").split("\n")[:-2]:
        name, _, value = field.partition(":")
        name, value = name.lower(), value.strip(" \t\r")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    http_1_1 = minor != "0"
    problem = header_problem(headers, http_1_1)
    if problem:
        return HttpRequest(problem)
    has_body = "transfer-encoding" in headers or int(headers.get("content-length", "0")) > 0
    connection = headers.get("connection", "")[:MAX_ACCEPT].lower()
    options = [each.strip() for each in connection.split(",")]
    return HttpRequest(
        size=len(head),
        method=method,
        path=path,
        user=clean(urllib.parse.unquote_to_bytes(line[2][1 : 3 * MAX_QUERY])[:MAX_QUERY]),
        query=query,
        headers=headers,
        body=None if has_body else b"",
        expects=http_1_1 and headers.get("expect", "").lower() == "100-continue",
        keep="close" not in options and (http_1_1 or "keep-alive" in options),
    )


def parse_begun_head(data: bytes) -> HttpRequest | None:
    """The refusal of a head that is incomplete in `data`, or None if it may still be valid."""
    if b"\n" in data.lstrip(b"\r\n") and not _REQUEST_LINE.match(data):
        return HttpRequest(400)  # perhaps HTTP/0.9, without headers
    return HttpRequest(431) if len(data) >= MAX_HTTP_HEAD else None


def parse_chunks(head: HttpRequest, data: bytes) -> HttpRequest:
    """The request with its chunked body (section 7.1), without extensions and trailers."""
    text, at = b"\r\n" + data[head.size :], 0  # so that each chunk follows an end of line
    pieces: list[bytes] = []
    while at <= MAX_BODY and len(pieces) <= MAX_CHUNKS:
        last = _LAST_CHUNK.match(text, at, at + MAX_TRAILERS)
        if last:
            return head._replace(size=head.size + last.end() - 2, body=b"".join(pieces))
        chunk = _CHUNK.match(text, at)
        size = int(chunk[1], 16) if chunk else 0
        if not (chunk and size):
            end = b"\r\n\r\n" if chunk else b"\n"
            is_wrong = end in text[at + 2 :] or len(text) - at > MAX_TRAILERS
            return HttpRequest(400) if is_wrong else head
        at = chunk.end() + size
        pieces.append(text[chunk.end() : at])
    return HttpRequest(413)


def parse_http_request(data: bytes) -> HttpRequest | None:
    """The request at the front of `data`, or None while its head is incomplete."""
    found = _HEAD.match(data, 0, MAX_HTTP_HEAD)
    if not found:
        return parse_begun_head(data)
    head = parse_complete_head(found[0])
    if head.body is not None:
        return head
    if "transfer-encoding" in head.headers:
        return parse_chunks(head, data)
    end = head.size + int(head.headers["content-length"])
    return head._replace(size=end, body=data[head.size : end]) if len(data) >= end else head


# ---- pages -------------------------------------------------------------------------------------

# The formats of pages, each with the media ranges that admit it besides */*, its own type first.
FORMATS = {
    "html": ["text/html", "text/*"],
    "text": ["text/plain", "text/*"],
    "json": ["application/json", "application/*"],
    "atom": ["application/atom+xml", "application/rss+xml", "application/xml", "application/*"],
}


@functools.lru_cache(maxsize=128)  # 2 MB at the most; without it, a page takes 50 % longer
def choose_format(query: str, accept: str) -> str:
    """The name in FORMATS that a request asks for, or "" if it accepts none of them.

    The query decides, else the Accept header. There each format has the weight of the most
    specific range that admits it. Among equal weights, a named type comes before one that a
    wildcard admits; then the client's order decides, then ours.
    """
    asked = urllib.parse.parse_qs(query[:MAX_QUERY]).get("format")
    if asked:
        return asked[-1] if asked[-1] in FORMATS else ""
    ranks: dict[str, tuple[float, int]] = {}
    for place, part in enumerate((accept or "*/*")[:MAX_ACCEPT].lower().split(",")):
        media_range, *parameters = map(str.strip, part.split(";"))
        weight = next((word[2:] for word in parameters if word.startswith("q=")), "1")
        if re.fullmatch(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?", weight):
            ranks[media_range] = float(weight), -MAX_ACCEPT if "*" in media_range else -place
    found = {
        name: next((ranks[each] for each in (*ranges, "*/*") if each in ranks), (0.0, 0))
        for name, ranges in FORMATS.items()
    }
    best = max(found, key=found.__getitem__)
    return best if found[best][0] else ""


STYLE = """
:root { color-scheme: light dark; background: Canvas; padding: 0 1rem }
body { font: 1.1rem/1.5 system-ui, sans-serif; max-width: 48rem; margin: 2rem auto }
h1, p, pre, li > * { unicode-bidi: plaintext; overflow-wrap: anywhere }
pre { white-space: pre-wrap; font-size: .9rem }
h1 + p { font-size: 1.4rem }
ul { padding: 0 }
li { display: flex; flex-wrap: wrap; gap: 0 1rem; padding: .6rem 0; border-top: 1px solid #8886 }
li > a { flex: 1 0 11rem; font-weight: bold }
li > span { flex: 9 1 20rem; display: -webkit-box; overflow: hidden }
li > span { -webkit-box-orient: vertical; -webkit-line-clamp: 3 }
time { white-space: nowrap }
time, nav, footer { opacity: .75; font-size: .9rem }
"""
STYLE_SHA256 = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
PAGE_HEADERS = (
    "Cache-Control: no-cache\r\nVary: Accept\r\nX-Content-Type-Options: nosniff\r\n"
    f"Content-Security-Policy: default-src 'none'; style-src 'sha256-{STYLE_SHA256}'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'\r\n"
)
HTML_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
{feed}<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>{main}
</main>
</body>
</html>
"""
NO_STATUS = "<p>Nobody has a status yet: write <code>user: status</code> into the users file.</p>\n"
ATOM_FEED = """<?xml version="1.0" encoding="utf-8"?>
<feed xmlns="http://www.w3.org/2005/Atom">
<id>{id}</id>
<title>{title}</title>
<updated>{updated}</updated>
<author><name>fingerd</name></author>
<link rel="alternate" type="text/html" href="{url}"/>
<link rel="self" href="{url}?format=atom"/>
{entries}</feed>
"""
ATOM_ENTRY = """<entry>
<id>{id}#{digest:.20}</id>
<title>{user}: {text}</title>
<updated>{updated}</updated>
<author><name>{user}</name></author>
<link rel="alternate" type="text/html" href="{url}"/>
<content>{text}</content>
</entry>
"""


def html_page(title: str, main: str, feed: str = "") -> str:
    """A page with `main`, in HTML, below the title, and with the URL of a feed, if it has one."""
    link = f'<link rel="alternate" type="application/atom+xml" href="{feed}">\n' if feed else ""
    return HTML_PAGE.format(title=html.escape(title), main=main, feed=link, style=STYLE)


def html_time(when: float) -> str:
    """`when` as an exact <time> element."""
    return f'<time datetime="{iso_time(when)}">{plain_time(when)}</time>'


# An address may hold parentheses in pairs, and does not end with a punctuation mark.
_ADDRESS = re.compile(r"(https?://(?:[^\s<>\"'()]|\([^\s<>\"'()]*\))+(?<![.,;:!?]))")


def html_status(text: str) -> str:
    """A status in HTML; the http and https addresses in it are links."""
    parts = [html.escape(part) for part in _ADDRESS.split(text)]
    parts[1::2] = [f'<a href="{url}" rel="nofollow noopener">{url}</a>' for url in parts[1::2]]
    return "".join(parts)


def json_status(user: str, text: str, since: float, until: float | None, plan: str = "") -> str:
    """A user's status as a JSON object, with the plan if there is one; a missing time is null."""
    times = {"since": iso_time(since) if text else None, "until": until and iso_time(until)}
    more = {"plan": plan} if plan else {}
    return json.dumps({"user": user, "status": text, **times, **more}, ensure_ascii=False)


def json_list(objects: Iterator[str]) -> Iterator[str]:
    """These JSON objects as an array with one in each line, in pieces."""
    return itertools.chain(["[", next(objects, "")], (",\n" + each for each in objects), ["]\n"])


def parse_json_list(data: bytes, known: Mapping[str, str], now: float) -> UsersFile:
    """The users in a `json_list` of `json_status`; a line with something else is skipped.

    A date more than MAX_SKEW after `now` becomes `now`; an end is at most `now` + MAX_AHEAD.
    """
    dates: dict[str, float] = {}
    ends: dict[str, float] = {}

    def lines() -> Iterator[tuple[str, str]]:
        for line, problem in map(clean_line, io.BytesIO(data)):
            line = line.lstrip("[").rstrip(",]")
            try:
                if line:
                    entry = json.loads(line)
                    user, since = clean(entry["user"]), parse_iso_time(entry["since"])
                    text, until = clean(entry["status"]), entry.get("until")
                    end = min(parse_iso_time(until), now + MAX_AHEAD) if until else 0.0
                    line, problem = f"{user}: {text}", entry_problem(user, text)
                    if not problem:
                        dates[user] = since if 0 <= since <= now + MAX_SKEW else now
                        ends[user] = end
            except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
                problem = "not a status in JSON"
            yield line, problem

    users = parse_users(lines(), known)
    return users._replace(dates=dates, ends={user: end for user, end in ends.items() if end})


def user_url(base: str, user: str) -> str:
    """The URL of a user's page below `base`, or for "" that of everybody's page, in HTML."""
    return html.escape(base) + urllib.parse.quote(user, safe="")


# ---- XML-RPC -----------------------------------------------------------------------------------

# Fault codes, from "Specification for Fault Code Interoperability" (Dan Libby, 2001).
PARSE_ERROR, UNKNOWN_ENCODING = -32700, -32701
NO_METHOD, INVALID_PARAMS, DENIED = -32601, -32602, -32500
# Python remembers each name of an encoding that it looks up, so there must be few.
XML_ENCODINGS = re.compile(
    "utf-?8|(us-)?ascii|iso-?8859-([1-9]|1[0-6])|latin-?1|latin9"
    "|(windows-|cp)125[0-8]|cp(437|850|866)|koi8-[ru]|macintosh"
)
_ENCODING = re.compile(r"(?:encoding|charset)\s*=\s*[\"']?([^\s;\"']+)", re.IGNORECASE)


def xml_encoding(body: bytes, content_type: str) -> str:
    """The encoding that an XML document declares, or else its Content-Type (RFC 7303)."""
    declaration = body[:MAX_QUERY].partition(b">")[0].decode("latin-1")
    found = _ENCODING.search(f"{declaration} {content_type}")
    return found[1].lower().replace("_", "-") if found else "utf-8"


class RpcCall(NamedTuple):
    """A call of a method, or the fault that answers a request without one."""

    method: str = ""
    params: tuple[Any, ...] = ()
    fault: Fault | None = None


def parse_rpc_call(body: bytes, content_type: str = "") -> RpcCall:
    """The method and the parameters in the body of a request, or the fault that answers it."""
    encoding = xml_encoding(body, content_type)
    if not XML_ENCODINGS.fullmatch(encoding):
        return RpcCall(fault=Fault(UNKNOWN_ENCODING, "unsupported encoding"))
    try:
        text = body.decode(encoding)
        # A DOCTYPE may declare entities, which can expand without bound.
        params, method = xmlrpc.client.loads("" if "<!DOCTYPE" in text else text)
    except Exception:  # the library lets broken input raise almost anything
        method = None
    if method is None:
        return RpcCall(fault=Fault(PARSE_ERROR, "not a method call in well-formed XML-RPC"))
    return RpcCall(method.strip(), params)


# ---- IRC (RFC 2812, modern.ircdocs.horse, IRCv3) ---------------------------------------------


class IrcLine(NamedTuple):
    """A parsed line."""

    tags: str  # as they were sent
    source: str  # nick!user@host, or the name of a server
    command: str
    params: list[str]

    def param(self, index: int) -> str:
        """The parameter at `index`, or "" if there are fewer."""
        return self.params[index] if index < len(self.params) else ""


def parse_irc_line(raw: bytes) -> IrcLine:
    """Parse the bytes before an LF, whatever they are (RFC 2812, section 2.3.1; IRCv3 tags)."""
    text = raw.rstrip(b"\r").decode("utf-8", "replace")
    tags, source, text = re.findall("(?:@([^ ]*) *)?(?::([^ ]*) *)?(.*)", text, re.DOTALL)[0]
    head, colon, trailing = f" {text}".partition(" :")
    command, *params = [word for word in head.split(" ") if word] or [""]
    if colon:
        params.append(trailing)
    return IrcLine(tags, source, command.upper(), params)


def format_irc_line(command: str, *params: str) -> bytes:
    """A line as bytes. CR, LF and NUL are removed; the last parameter may contain blanks."""
    *middle, last = params
    if not last or last.startswith(":") or " " in last:
        last = f":{last}"
    line = re.sub("[\r\n\0]", "", " ".join([command, *middle, last]))
    return line.encode("utf-8", "replace") + b"\r\n"


def is_person(line: IrcLine) -> bool:
    """False for bots (by their tag), servers, bouncers (`*status`), services and other fingerds."""
    services = r"[^!]*Serv!|[^!]*!c?services?@|[^@]*@(services|CServe)\."
    programs = rf"[^!]*$|[*-]|{services}|[^!]*!~?fingerd@"
    return not (re.search("(^|[;/])bot(=|;|$)", line.tags) or re.match(programs, line.source))


def reconnect_delay(attempt: int, jitter: float) -> float:
    """The back-off in seconds after `attempt` failures; `jitter` is a random 0 to 1."""
    delay = IRC_RETRY_SECONDS * 2.0 ** min(attempt, 20)  # 2.0 ** 1024 is an OverflowError
    return min(IRC_LONGEST_RETRY_SECONDS, delay * (1 + jitter / 2))


# ================================================================================================
# 3. store: one dict behind one lock; the most recent change of a user's status wins
# ================================================================================================


class Status(NamedTuple):
    """What is shown for a user, since when, and until when if it ends (seconds since 1970)."""

    text: str
    since: float
    until: float | None = None


class Message(NamedTuple):
    """A text that was set. It is shown as long as the user's line in the file stays the same."""

    text: str
    since: float
    covers: str | None  # the text in the file when it was set, None if the user was not there
    by: str  # the address or account that set it
    until: float | None = None  # when it is taken back; None for never


class NotKept(Exception):
    """A message could not be kept, and nothing changed; the text is the reason."""


def sorted_in_slices(names: list[str]) -> list[str]:
    """`names` in order; it sorts slices, because one sort of a million names stops every thread."""
    size = 20_000
    slices = [sorted(names[at : at + size]) for at in range(0, len(names), size)]
    in_order = all(left[-1] < right[0] for left, right in zip(slices, slices[1:]))
    return list(itertools.chain(*slices) if in_order else heapq.merge(*slices))


def cased(names: Iterable[str]) -> dict[str, str]:
    """The names that casefold() changes, by its result; "" if two have the same."""
    found: dict[str, str] = {}
    for name in names:
        folded = name.casefold()
        if folded != name:
            found[folded] = "" if folded in found else name
    return found


class Snapshot(NamedTuple):
    """All that is visible at one moment. It never changes: a writer publishes another one.

    A user of the file costs two strings and no object of our own, since the garbage collector
    does not look at strings.
    """

    version: int = 0  # rises with everything that becomes visible
    changed: float = 0.0  # when it became visible
    file: dict[str, str] = {}  # what the users file says, empty texts included
    loaded: float = 0.0  # when the file was loaded first: the date of lines that are not in `dates`
    dates: dict[str, float] = {}  # of the lines that changed later, or came with a date
    ends: dict[str, float] = {}  # when another server will take back lines of its list
    messages: dict[str, Message] = {}  # all of them, hidden ones included
    names: list[str] = []  # the users with a text in the file, sorted
    others: list[str] = []  # the users with a message alone, sorted
    file_cased: dict[str, str] = {}  # the names in `file` that casefold() changes, by its result
    others_cased: dict[str, str] = {}  # the same for `others`

    def get(self, user: str) -> Status:
        """The user's status; its text is "" if there is none."""
        line, message = self.file.get(user), self.messages.get(user)
        if message and message.covers == line:
            return Status(message.text, message.since, message.until)
        return Status(line or "", self.dates.get(user, self.loaded), self.ends.get(user))

    def find(self, name: str) -> str:
        """The user with this name, else the only one whose name differs only in case, else ""."""
        if name in self.file or self.get(name).text:
            return name
        folded = name.casefold()
        found = {each[folded] for each in (self.file_cased, self.others_cased) if folded in each}
        if folded in self.file or self.get(folded).text:
            found.add(folded)
        return found.pop() if len(found) == 1 else ""

    def users(self) -> Iterator[tuple[str, Status]]:
        """Everybody who has a status, sorted by name."""
        return ((name, self.get(name)) for name in heapq.merge(self.names, self.others))

    def size(self) -> int:
        """How many users have a status."""
        return len(self.names) + len(self.others)

    def lines(self) -> dict[str, tuple[str, float]]:
        """The users file's statuses with their dates, unless they are too many to be kept."""
        if len(self.file) > MAX_DATED:
            return {}
        dates, texts = self.dates, self.file.items()
        return {user: (text, dates.get(user, self.loaded)) for user, text in texts if text}

    def settled(self, now: float) -> Snapshot:
        """The snapshot without the messages that are over, and with `others` computed again.

        A message is over if it has no text, if it has expired, or if the user's line
        in the file is not the one that it covers.
        """
        messages = {
            user: message
            for user, message in self.messages.items()
            if message.text
            and self.file.get(user, message.covers) == message.covers
            and (message.until is None or message.until > now)
        }
        new = self._replace(messages=messages)
        others = [user for user in messages if not self.file.get(user) and new.get(user).text]
        return new._replace(others=sorted_in_slices(others), others_cased=cased(others))


class StateFile:
    """Keeps the messages, and the dates of the file's lines, on disk. For one thread at a time.

    It is opened after privileges are dropped, because SQLite also opens files beside it.
    Each transaction opens it again, so that it can be replaced or copied at any other time.
    """

    APPLICATION_ID = 0x46494E47  # "FING", in the file's header
    VERSION = 2  # of the schema
    SCHEMA = f"""
        PRAGMA application_id = {APPLICATION_ID};
        PRAGMA user_version = {VERSION};
        CREATE TABLE IF NOT EXISTS messages (
            user TEXT PRIMARY KEY, text TEXT NOT NULL, since REAL NOT NULL, covers TEXT,
            set_by TEXT NOT NULL, until REAL
        ) WITHOUT ROWID;
        CREATE TABLE IF NOT EXISTS lines (
            user TEXT PRIMARY KEY, text TEXT NOT NULL, since REAL NOT NULL
        ) WITHOUT ROWID;
    """
    FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW

    def __init__(self, path: pathlib.Path) -> None:
        """Lock the file, create it if it is missing, and read it; raise NotKept on failure."""
        self._path, self._opened = path, contextlib.ExitStack()
        self._file: dict[str, str] = {}  # the users file whose lines are on disk
        self.close = self._opened.close
        if not sqlite3:
            raise NotKept(f"{path}: this Python has no sqlite3")
        try:
            # A lock on the database itself would be lost whenever SQLite closes a descriptor.
            lock = os.open(f"{path}-lock", self.FLAGS, 0o600)
            self._opened.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with self._transaction() as db:
                (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
                if verdict != "ok":
                    raise OSError("damaged: " + verdict.splitlines()[-1])
                now = time.time()
                db.execute("DELETE FROM messages WHERE until <= ?", (now,))
                for table in ("messages", "lines"):  # the clock may have been fast
                    db.execute(f"UPDATE {table} SET since = ? WHERE since > ?", (now, now))
                self.messages, self.lines = self._read(db, "messages"), self._read(db, "lines")
        except (OSError, sqlite3.Error) as problem:
            self.close()
            words = getattr(problem, "strerror", None) or problem
            remedy = f"repair it, move it away, or give it and its directory to uid {os.geteuid()}"
            if isinstance(problem, BlockingIOError):
                words, remedy = "another fingerd is using it", "stop that one"
            raise NotKept(f"{path}: {words}; {remedy} (see --state)") from None

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """A transaction in the file; at its end the changes are on disk and the file is closed."""
        os.close(os.open(self._path, self.FLAGS, 0o600))  # SQLite would let others read it
        db = sqlite3.connect(self._path, timeout=LOCKED_SECONDS, isolation_level=None)
        with contextlib.closing(db):
            self._begin(db)
            try:
                with db:
                    yield db
            except sqlite3.Error:  # an empty commit replaces what is left in the write-ahead log
                with contextlib.suppress(sqlite3.Error):
                    db.execute(f"PRAGMA user_version = {self.VERSION}")
                raise

    def _begin(self, db: sqlite3.Connection) -> None:
        """Begin a transaction; raise OSError, and change nothing, if the file is not ours."""
        (application,) = db.execute("PRAGMA application_id").fetchone()
        (version,) = db.execute("PRAGMA user_version").fetchone()
        tables = db.execute("SELECT name FROM sqlite_master").fetchall()
        if application != self.APPLICATION_ID and (application or tables):
            raise OSError("not a fingerd state file")
        if version > self.VERSION:
            raise OSError("made by a newer fingerd")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        # Each commit is copied into the database, so that losing the log beside it loses nothing.
        db.execute("PRAGMA wal_autocheckpoint = 1")
        upgrade = "ALTER TABLE messages ADD COLUMN until REAL;" if version == 1 else ""
        schema = self.SCHEMA if version < self.VERSION else ""
        db.executescript(f"BEGIN IMMEDIATE; {upgrade} {schema}")

    def _read(self, db: sqlite3.Connection, table: str) -> dict[str, Any]:
        """The rows of a table by user."""
        return {user: tuple(more) for user, *more in db.execute(f"SELECT * FROM {table}")}

    def write(self, new: Snapshot) -> None:
        """Write the messages and the lines of `new` to disk; raise NotKept if that fails."""
        try:
            with self._transaction() as db:
                found = self._read(db, "messages")
                self._replace(db, "messages", found, new.messages)
                # If another program has changed one table, the other one is not trusted either.
                if new.file is not self._file or found != self.messages:
                    self._replace(db, "lines", self._read(db, "lines"), new.lines())
        except (OSError, sqlite3.Error) as problem:
            raise NotKept(f"could not be kept: {problem}") from None
        if found != self.messages:
            log.warning("%s: another program changed it; its changes are overwritten", self._path)
        self.messages, self._file = new.messages, new.file

    def _replace(
        self, db: sqlite3.Connection, table: str, old: Mapping[str, Any], new: Mapping[str, Any]
    ) -> None:
        """Turn the rows of a table, which are `old`, into `new`."""
        for user, row in old.items():
            if row != new.get(user):
                db.execute(f"DELETE FROM {table} WHERE user = ?", (user,))
        for user, row in new.items():
            if row != old.get(user):
                db.execute(f"INSERT INTO {table} VALUES (?{', ?' * len(row)})", (user, *row))


class StatusStore:
    """Everybody's status: what the users file says, and the messages that were set over it.

    A reader takes a snapshot and no lock. Writers take turns; a writer may wait for the disk, and
    nobody but other writers waits with it.
    """

    def __init__(self) -> None:
        self._state: StateFile | None = None
        self.lost_at_restart = False  # whether the state file could not be opened
        self._writing = threading.Lock()
        # Calls of `set` that wait for a commit: name, message, and what the call will return.
        self._orders: collections.deque[tuple[str, Message, Future[str]]] = collections.deque()
        self._changes: collections.deque[Any] = collections.deque(maxlen=MAX_CHANGES)
        self.now = Snapshot()  # all that is visible
        self.problems: dict[str, str] = {}  # by name: of the users file and the state file

    def restore(self, state: StateFile) -> None:
        """Take the messages and the dates of lines from `state`, and keep all changes there."""
        with self._writing:
            self._state, now = state, self.now
            lines = state.lines.items()
            dates = {user: since for user, (text, since) in lines if now.file.get(user) == text}
            messages = {  # version 1 did not compose characters
                clean(user): Message(clean(text), since, covers and clean(covers), *more)
                for user, (text, since, covers, *more) in state.messages.items()
            }
            when = max([now.changed, *(message.since for message in messages.values())])
            self._publish(now._replace(messages=messages, dates={**dates, **now.dates}), when)

    def changes_after(self, version: int) -> list[tuple[int, str, str]]:
        """The statuses that appeared after `version`, MAX_CHANGES at most: version, user, text."""
        return [change for change in self._changes.copy() if change[0] > version]

    def replace_file(self, users: UsersFile, when: float) -> bool:
        """Replace the users file's content as of `when`; return False if nothing is new.

        A message is forgotten if its line changed, and hidden if its user is absent now. The
        first load is announced to nobody. The dicts in `users` belong to the store from now on.
        """
        with self._writing:
            old, texts, first = self.now, users.texts, not self.now.version
            changed = [user for user, text in texts.items() if old.file.get(user) != text]
            if not (first or changed or len(texts) < len(old.file) or users.dates is not None):
                return False
            if first:
                old, changed = old._replace(loaded=when), []
            dates = {user: since for user, since in old.dates.items() if user in texts}
            new = old._replace(
                file=texts,
                dates={**dates, **dict.fromkeys(changed, when), **(users.dates or {})},
                ends=users.ends,
                names=sorted_in_slices([user for user in texts if texts[user]]),
                file_cased=cased(texts),
            )
            self._publish(new, when, changed)
        return True

    def expire(self, now: float) -> None:
        """Take back the messages that have expired."""
        with self._writing:
            if any(each.until and each.until <= now for each in self.now.messages.values()):
                self._publish(self.now, now)

    def set(self, user: str, text: str, by: str = "", until: float | None = None) -> str:
        """Set the user's message, or take it back for ""; return the name as the store spells it.

        It returns once the change is on disk and visible; if that fails, nothing changes and it
        raises NotKept. Callers that wait during a commit share the next one.
        """
        now = self.now
        if text and len(now.messages) >= MAX_MESSAGES and now.find(user) not in now.messages:
            raise NotKept(f"no room for more than {MAX_MESSAGES} messages")
        outcome: Future[str] = Future()
        self._orders.append((user, Message(text, 0.0, None, by, until), outcome))
        with self._writing:
            if not outcome.done():
                self._carry_out()
        return outcome.result(0)

    def _carry_out(self) -> None:
        """Commit and publish all orders, and note each one's outcome."""
        old, when = self.now, time.time()
        messages, users = dict(old.messages), {}
        # `find` knows neither new users nor those with a hidden message: look these up by casefold.
        hidden = [user for user, each in messages.items() if each.covers != old.file.get(user)]
        unseen = {user.casefold(): user for user in hidden}
        while self._orders:
            name, message, outcome = self._orders.popleft()
            user = old.find(name) or unseen.setdefault(name.casefold(), name)
            messages[user] = message._replace(since=when, covers=old.file.get(user))
            users[outcome] = user
        new = old._replace(messages=messages)
        problem = self._publish(new, when, users.values(), only_if_kept=True)
        for outcome, user in users.items():
            if problem:
                outcome.set_exception(NotKept(problem))
            else:
                outcome.set_result(user)

    def _publish(
        self, new: Snapshot, when: float, users: Iterable[str] = (), only_if_kept: bool = False
    ) -> str:
        """Put `new`, without the messages that are over, on disk and make it visible.

        `users` are those whose lines or messages were replaced. What cannot be put on disk is tried
        again with the next change. With `only_if_kept`, it is not made visible then, and the
        reason is returned.
        """
        old, new, version = self.now, new.settled(when), self.now.version + 1
        changed = dict.fromkeys([*users, *(u for u in old.messages if u not in new.messages)])
        try:
            if self._state:
                self._state.write(new)
                self.problems.pop("state file", None)
        except NotKept as problem:
            self.problems["state file"] = str(problem)
            log.error("the state file: %s", problem)
            if only_if_kept:
                return str(problem)
        for user in changed:
            text = new.get(user).text
            if text and text != old.get(user).text:
                version += 1
                self._changes.append((version, user, text))
        self.now = new._replace(version=version, changed=when)
        return ""


# ================================================================================================
# 4. answers: the store and a parsed query make a reply; no socket, thread or clock
# ================================================================================================


class Policy(NamedTuple):
    """What the administrator decided about answers."""

    private: bool = False  # nobody is told who has a status
    hostnames: frozenset[str] = frozenset({"localhost"})  # this machine's names, in lower case
    finger_host: str = "localhost"  # the host in the finger command that pages show
    shows_command: bool = False  # whether they show it: finger(1) knows only port 79
    public_url: str = "/"  # the web server's address behind a proxy, ending in "/"
    feed_root: str = "tag:fingerd,2026:"  # the start of ids in feeds: the same on all replicas


# ---- finger ------------------------------------------------------------------------------------


def finger_listing(now: Snapshot, long: bool) -> str:
    """The first users, MAX_LISTED and MAX_LISTING at most, and how many more there are."""
    users = itertools.islice(now.users(), MAX_LISTED)
    form = "{}: {} (since {})\r\n" if long else "{}: {}\r\n"
    lines = [form.format(user, status.text, plain_time(status.since)) for user, status in users]
    sizes = itertools.accumulate(map(len, lines))
    lines = [line for line, size in zip(lines, sizes) if size <= MAX_LISTING]
    more = now.size() - len(lines)
    return "".join(lines) + (f"... and {more} more\r\n" if more else "")


def long_answer(user: str, status: Status) -> str:
    """The lines about a user who was asked for with /W."""
    until = f"\nUntil: {plain_time(status.until)}" if status.until else ""
    return f"Login: {user}\nStatus: {status.text}\nSince: {plain_time(status.since)}{until}"


def is_ours(host: str, reached: str, policy: Policy) -> bool:
    """Whether the `host` in a query is this machine, which the client reached as `reached`."""
    host = host.lower().rstrip(".")
    return host in policy.hostnames or host.strip("[]") == reached


def finger_answer(now: Snapshot, query: FingerQuery, policy: Policy, plan: str = "") -> str:
    """The answer to a finger query, each line ended by CRLF (RFC 1288, section 2.2).

    `query.host` is None or a host that is not ours; `plan` is the text of the user's plan.
    """
    if query.too_long:
        return "Query too long\r\n"
    if query.host is not None:
        return "Finger forwarding service denied\r\n"
    if not query.user:
        denied = "Finger online user list denied\r\n"
        return denied if policy.private else finger_listing(now, query.long)
    user = query.user if query.user in now.file else now.find(query.user)
    status = now.get(user)
    answer = long_answer(user, status) if query.long and status.text else status.text
    if plan:
        answer = f"{answer}\n\nPlan:\n{plan}".lstrip("\n")
    return (answer or NO_SUCH_USER).replace("\n", "\r\n") + "\r\n"


# ---- web ---------------------------------------------------------------------------------------


class Page(NamedTuple):
    """The part of a response that is the same for every request."""

    status: int
    headers: str  # each with its CRLF
    pieces: list[bytes] = []
    etag: str = ""
    modified: int = 0  # its last change, rounded up, in seconds since 1970; 0 if it is not known


def make_page(status: int, media_type: str, texts: Iterable[str], since: float = -1) -> Page:
    """The page of `texts`, which changed last at `since`; -1 if that is not known."""
    texts = iter(texts)
    pieces = list(iter(lambda: "".join(itertools.islice(texts, 1_000)).encode(), b""))
    sha256 = hashlib.sha256()
    for piece in pieces:
        sha256.update(piece)
    etag = f'"{sha256.hexdigest()[:20]}"'
    headers = (
        f"{PAGE_HEADERS}ETag: {etag}\r\nContent-Type: {media_type}; charset=utf-8\r\n"
        f"Content-Length: {sum(map(len, pieces))}\r\n"
    )
    return Page(status, headers, pieces, etag, int(since) + 1)


def error_page(status: int, words: str = "") -> Page:
    """A page with the status and `words`, or the status's usual phrase."""
    words = words or http.client.responses[status]
    return make_page(status, "text/html", [html_page(str(status), f"<p>{words}</p>")])


METHODS = ("GET", "HEAD", "POST", "OPTIONS")
# For scripts of other sites: they may read answers, and send GET and HEAD.
ANY_ORIGIN = "Access-Control-Allow-Origin: *\r\n"
ALLOWED = "Access-Control-Allow-Methods: GET, HEAD\r\nAccess-Control-Allow-Headers: *\r\n"


def status_html(status: Status) -> str:
    """A status and its times."""
    until = f", until {html_time(status.until)}" if status.until else ""
    times = f"since {html_time(status.since)}{until}"
    return f"<p>{html_status(status.text)}</p>\n<p>{times}</p>\n"


def user_html(user: str, status: Status, policy: Policy, plan: str) -> str:
    """The page of one user, who may be unknown."""
    everybody = f'<a href="{user_url(policy.public_url, "")}">everybody</a>'
    if not (status.text or plan):
        return html_page(user, f"<p>{NO_SUCH_USER}</p>\n<footer>{everybody}</footer>")
    feed = user_url(policy.public_url, user) + "?format=atom"
    command = html.escape(f"finger {shlex.quote(f'{user}@{policy.finger_host}')}")
    hint = f"<code>{command}</code> · " * policy.shows_command
    main = status_html(status) if status.text else ""
    main += f"<h2>Plan</h2>\n<pre>\n{html.escape(plan)}</pre>\n" if plan else ""
    main += f'<footer>{everybody} · {hint}<a href="{feed}">feed</a></footer>'
    return html_page(user, main, feed)


def atom_feed(user: str, statuses: list[tuple[str, Status]], policy: Policy) -> str:
    """The Atom feed (RFC 4287) of `user`, or of everybody for ""; the newest entry comes first.

    An entry's id is the same as long as its text is, also after a restart and on a replica.
    """
    entries = [
        ATOM_ENTRY.format(
            id=user_url(policy.feed_root, name),
            digest=hashlib.sha256(text.encode()).hexdigest(),
            user=html.escape(name),
            text=html.escape(text),
            updated=iso_time(since),
            url=user_url(policy.public_url, name),
        )
        for name, (text, since, _) in statuses
        if text
    ]
    return ATOM_FEED.format(
        id=user_url(policy.feed_root, user),
        title=html.escape(user or "fingerd"),
        updated=iso_time(statuses[0][1].since if statuses else 0),
        url=user_url(policy.public_url, user),
        entries="".join(entries),
    )


def newest(now: Snapshot, count: int) -> list[tuple[str, Status]]:
    """The `count` newest statuses with their users; replicas know whole seconds only."""
    return heapq.nlargest(count, now.users(), key=lambda item: int(item[1].since))


def row_html(user: str, status: Status, policy: Policy) -> str:
    """A user in the list."""
    link = f'<a href="{user_url(policy.public_url, user)}">{html.escape(user)}</a>'
    text, since = html_status(status.text), html_time(status.since)
    return f"<li>{link}<span>{text}</span>{since}</li>\n"


def list_html(now: Snapshot, policy: Policy) -> str:
    """The page at /: how to ask for a user and, unless that is private, the newest statuses."""
    title, usage = f"Statuses at {policy.finger_host}", "usage: site/user"
    if policy.private:
        return html_page(title, f"<p>The list of users is private here</p>\n<nav>{usage}</nav>")
    feed = user_url(policy.public_url, "") + "?format=atom"
    main = f'<p>What everybody here is up to</p>\n<nav>{usage} · <a href="{feed}">feed</a></nav>\n'
    rows = [row_html(user, status, policy) for user, status in newest(now, MAX_LISTED)]
    main += f"<ul>\n{''.join(rows)}</ul>\n" if rows else NO_STATUS
    more = now.size() - len(rows)
    main += f"<p>... and {more} more</p>\n" if more else ""
    return html_page(title, main, feed)


USER_PAGES: Mapping[str, Callable[[str, Status, Policy, str], str]] = {
    "html": user_html,
    "text": lambda user, status, policy, plan: (status.text or NO_SUCH_USER) + "\n",
    "json": lambda user, status, policy, plan: json_status(user, *status, plan) + "\n",
    "atom": lambda user, status, policy, plan: atom_feed(user, [(user, status)], policy),
}
LIST_PAGES: Mapping[str, Callable[[Snapshot, Policy], Iterable[str]]] = {  # in pieces
    "html": lambda now, policy: [list_html(now, policy)],
    "text": lambda now, policy: (f"{user}: {status.text}\n" for user, status in now.users()),
    "json": lambda now, policy: json_list(json_status(user, *rest) for user, rest in now.users()),
    "atom": lambda now, policy: [atom_feed("", newest(now, MAX_FEED), policy)],
}


def is_wanted(headers: Mapping[str, str], page: Page) -> bool:
    """Whether the client wants the page as it is now (RFC 9110, section 13.2.2)."""
    tags, date = headers.get("if-match"), headers.get("if-unmodified-since")
    if tags is not None:  # a weak tag, W/"...", does not count here
        return tags == "*" or (page.etag in tags and f"W/{page.etag}" not in tags)
    return date is None or page.modified <= parse_http_time(date)


def is_known(headers: Mapping[str, str], page: Page) -> bool:
    """Whether the client has the page as it is now."""
    tags, date = headers.get("if-none-match"), headers.get("if-modified-since")
    if tags is not None:
        return tags == "*" or page.etag in tags
    return page.modified > 0 and date == http_time(page.modified)


class WebAnswers:
    """The pages of the store's users.

    It remembers the last list of all users in each format, of any length, and MAX_PAGES pages of
    users without a plan, of 20 kB at most.
    """

    def __init__(self, store: StatusStore, policy: Policy) -> None:
        self._store, self._policy = store, policy
        self._lists: dict[str, tuple[int, Page]] = {}  # by format, with the store's version
        self._remembered = functools.lru_cache(MAX_PAGES)(self._make_user)

    def _allows(self, method: str, path: str) -> bool:
        """Whether `path` allows the HTTP method."""
        if method == "POST":
            return path in ("/", "/RPC2")  # some clients post their calls to /
        if method == "OPTIONS":
            return path != "/RPC2" and self._policy.public_url != "/"
        return method in ("GET", "HEAD") and (path != "/RPC2" or self._store.now.find("RPC2") != "")

    def refusal(self, request: HttpRequest) -> Page | None:
        """The page that refuses a request because of its head, or None."""
        if request.problem or not self._allows(request.method, request.path):
            return error_page(request.problem or 405)
        return None

    def takes_long(self, request: HttpRequest, now: Snapshot) -> bool:
        """Whether a GET asks for a list of many users that is not remembered."""
        if request.path != "/" or now.size() <= MAX_SHORT_LIST:
            return False
        name = choose_format(request.query, request.headers.get("accept", ""))
        return not self._remembered_list(name, now)

    def page(self, request: HttpRequest, now: Snapshot, plan: str = "") -> Page:
        """The page that a GET asks for; `plan` is the text of the user's plan."""
        name = choose_format(request.query, request.headers.get("accept", ""))
        if not name:
            return error_page(406, f"The formats are {', '.join(FORMATS)}.")
        page = self._known_page(name, request, now, plan)
        if page.status == 200 and not is_wanted(request.headers, page):
            return error_page(412)
        is_new = page.status != 200 or not is_known(request.headers, page)
        return page if is_new else page._replace(status=304, pieces=[])

    def _known_page(self, name: str, request: HttpRequest, now: Snapshot, plan: str) -> Page:
        """The page in the format `name`; it is made only if it is not remembered."""
        if request.path == "/":
            page = self._remembered_list(name, now)
            if not page:
                page = self._make_list(name, now)
                self._lists[name] = now.version, page
            return page
        user = now.find(request.user)
        make = self._make_user if plan else self._remembered
        return make(name, user or request.user[:MAX_NAME], now.get(user), plan)

    def _remembered_list(self, name: str, now: Snapshot) -> Page | None:
        """The list in the format `name`, or None if it is older than `now`."""
        version, page = self._lists.get(name, (0, None))
        return page if version >= now.version else None

    def _make_list(self, name: str, now: Snapshot) -> Page:
        """The list of all users in the format `name`."""
        is_private = self._policy.private
        if is_private and name != "html":
            return error_page(403, "The list of users is private here.")
        since = -1 if is_private else now.changed  # the date would reveal when messages are set
        return make_page(200, FORMATS[name][0], LIST_PAGES[name](now, self._policy), since)

    def _make_user(self, name: str, user: str, status: Status, plan: str) -> Page:
        """The page of one user. With a plan it has no date."""
        text = USER_PAGES[name](user, status, self._policy, plan)
        is_found = status.text or (plan and name in ("html", "json"))
        since = status.since if status.text and not plan else -1
        return make_page(200 if is_found else 404, FORMATS[name][0], [text], since)

    def response(self, request: HttpRequest, page: Page, now: float) -> list[bytes]:
        """The pieces of the response with `page` to `request` at the time `now`."""
        more = ""
        if page.status == 405:
            allowed = [method for method in METHODS if self._allows(method, request.path)]
            more += f"Allow: {', '.join(allowed)}\r\n"
        if self._store.problems:  # a header for monitoring
            more += f"Fingerd-Problem: {', '.join(sorted(self._store.problems))}\r\n"
        if self._policy.public_url != "/" and request.method != "POST" and request.path != "/RPC2":
            more += ANY_ORIGIN
        if 0 < page.modified <= now:
            more += f"Last-Modified: {http_time(page.modified)}\r\n"
        top = (
            f"HTTP/1.1 {page.status} {http.client.responses[page.status]}\r\n"
            f"Date: {http_time(int(now))}\r\n"
            f"Connection: {'keep-alive' if request.keep else 'close'}\r\n{more}{page.headers}\r\n"
        ).encode()
        pieces = [] if request.method == "HEAD" else page.pieces
        if len(pieces) == 1 and len(pieces[0]) <= BLOCK_BYTES:
            return [top + pieces[0]]
        return [top, *pieces]  # the pieces are shared, not copied


# ---- XML-RPC -----------------------------------------------------------------------------------

SHORT_CALLS = ("getStatus", "getUser")  # allowed in system.multicall
LONG_CALLS = ("getPlan", "listUsers", "system.multicall")  # computed by a worker
RPC_PARAMETERS = {"listUsers": [], "system.listMethods": [], "system.multicall": [list]}


def rpc_page(answer: Any) -> Page:
    """The response with a result, as a tuple of one, or with a fault."""
    text = xmlrpc.client.dumps(answer, methodresponse=True)
    # ASCII alone: some clients take Content-Length for a number of characters.
    return make_page(200, "text/xml", [text.encode("ascii", "xmlcharrefreplace").decode()])


class RpcAnswers(xmlrpc.server.SimpleXMLRPCDispatcher):
    """The XML-RPC methods, registered as the library documents.

    `page` takes the place of the library's `_marshaled_dispatch`: `parse_rpc_call` refuses a
    DOCTYPE, and a fault never holds a Python exception. What is overridden below adds limits and
    checks the types of parameters. The library's methodHelp shows the docstrings.
    """

    def __init__(self, store: StatusStore, policy: Policy, read_plan: Callable[[str], str]) -> None:
        super().__init__()
        self._store, self._policy, self._read_plan = store, policy, read_plan
        self._list_page = functools.lru_cache(1)(self._make_list_page)
        # 4 MB at the most: calls of MAX_SHORT_CALL bytes, their Content-Type and pages of 12 kB.
        self.short_answer = functools.lru_cache(128)(self._short_answer)
        for function in (self.getPlan, self.getStatus, self.getUser, self.listUsers):
            self.register_function(function)
        self.register_introspection_functions()
        self.register_multicall_functions()

    def page(self, call: RpcCall) -> Page:
        """The response to a call; that to listUsers is made once per version of the store."""
        try:
            if (call.method, call.params) == ("listUsers", ()):
                return self._list_page(self._store.now.version)
            return rpc_page(call.fault or (self._dispatch(call.method, call.params),))
        except Fault as fault:
            return rpc_page(fault)

    def _short_answer(self, body: bytes, content_type: str, _version: int) -> Page | RpcCall:
        """The response to a call, or the call itself if it takes long.

        It is remembered for the store's version; without that, a call takes 30 % longer.
        """
        call = parse_rpc_call(body, content_type)
        return call if call.method in LONG_CALLS else self.page(call)

    def _make_list_page(self, _version: int) -> Page:
        """The response to listUsers; it is remembered for the store's version."""
        return rpc_page((self._dispatch("listUsers", ()),))

    def _dispatch(self, method: str, params: Any) -> Any:
        """The method's result; raises a Fault if it is unknown or has wrong parameters."""
        if method not in self.funcs:
            raise Fault(NO_METHOD, "no such method")
        if [type(param) for param in params] != RPC_PARAMETERS.get(method, [str]):
            raise Fault(INVALID_PARAMS, "wrong parameters")
        return super()._dispatch(method, params)

    def getPlan(self, name: Any) -> Any:
        """The user's plan, or an empty string."""
        return self._read_plan(clean(name))

    def getStatus(self, name: Any) -> Any:
        """The user's status, and its times in UTC; a fault if there is none."""
        user, status = self._look_up(name)
        if not status.text:
            raise Fault(DENIED, NO_SUCH_USER)
        times = {"since": status.since, "until": status.until}
        return {"user": user, "status": status.text, **{k: utc(t) for k, t in times.items() if t}}

    def getUser(self, name: Any) -> Any:
        """The user's status, or "No such user"."""
        return self._look_up(name)[1].text or NO_SUCH_USER

    def _look_up(self, name: str) -> tuple[str, Status]:
        """The user called `name`, and the status."""
        now = self._store.now
        user = now.find(clean(name))
        return user, now.get(user)

    def listUsers(self) -> Any:
        """The users and their statuses; at most 10,000 of them."""
        if self._policy.private:
            raise Fault(DENIED, "Finger online user list denied")
        users = itertools.islice(self._store.now.users(), MAX_RPC_USERS)
        return {user: status.text for user, status in users}

    def system_multicall(self, call_list: list[Any]) -> list[Any]:
        """Up to 100 calls of getStatus and getUser: for each a list with its result, or a fault."""
        if len(call_list) > MAX_MULTICALL:
            raise Fault(INVALID_PARAMS, f"more than {MAX_MULTICALL} calls")
        results: list[Any] = []
        for call in call_list:
            try:
                results.append([self._short_call(call)])
            except Fault as fault:
                results.append({"faultCode": fault.faultCode, "faultString": fault.faultString})
        return results

    def _short_call(self, call: Any) -> Any:
        """The result of one of many calls."""
        name, params = map(call.get, ("methodName", "params")) if isinstance(call, dict) else (0, 0)
        if name not in SHORT_CALLS or not isinstance(params, list):
            raise Fault(INVALID_PARAMS, "only getStatus and getUser can be called together")
        return self._dispatch(name, params)


# ---- IRC -------------------------------------------------------------------------------------


class IrcOptions(NamedTuple):
    """The settings of the bot; each field NAME comes from the option `irc_NAME`."""

    server: tuple[str, int]  # its host and port; port 0 is the usual one
    tls: bool = True
    nick: str = "fingerbot"
    channels: list[str] = []  # each a name, or a name, a blank and a key
    account: str = ""
    password: str = ""  # of the account; without one, or with a certificate, of the server
    certificate: str = ""  # a PEM file with our certificate and its key
    fingerprint: str = ""  # SHA-256 of the only certificate to trust, in hexadecimal


class IrcChannel:
    """A channel that the bot is meant to be in."""

    def __init__(self, text: str) -> None:
        self.name, _, self.key = text.partition(" ")
        self.joined = False
        self.due = math.inf  # the time of the next attempt to join
        self.pause = IRC_KEEP_ALIVE_SECONDS  # from that attempt to the one after it


class IrcSession:
    """The protocol on one connection: received lines and times in, lines to send out.

    The caller calls `receive` for each line and `tick` often, and sends the result of `take`.
    `report` is called with lines for the log. A ConnectionError means that the session is over.
    """

    def __init__(
        self, options: IrcOptions, store: StatusStore, report: Callable[[str], None], now: float
    ) -> None:
        self.options, self.store, self.report, self.now = options, store, report, now
        self.channels = {c.name.lower(): c for c in map(IrcChannel, options.channels)}
        self.payload = ""  # of AUTHENTICATE (RFC 4616); a certificate needs none
        if options.account and not options.certificate:
            secret = f"\0{options.account}\0{options.password}"
            self.payload = base64.b64encode(secret.encode("utf-8", "replace")).decode()
        secrets = [options.password, self.payload, *(c.key for c in self.channels.values())]
        self.secrets = sorted(map(clean, secrets), key=len, reverse=True)
        self.nick = options.nick
        self.logged_in = not options.account
        self.registered = False
        self.settled = False  # whether the connection has lasted until a keep-alive
        self.heard = False  # whether the server has sent a line since the last keep-alive
        self.last_line = parse_irc_line(b"")  # the line that was handled last
        self.due = now + IRC_KEEP_ALIVE_SECONDS  # latest registration, then next keep-alive
        self.version = store.now.version  # of the last change that was announced
        self.askers: collections.deque[str] = collections.deque(maxlen=IRC_RECENT)  # user@hosts
        self.refusals: set[tuple[IrcChannel, str]] = set()  # channels and numerics that were logged
        self.queue: collections.deque[bytes] = collections.deque(maxlen=IRC_QUEUE_LINES)
        self.pace = 0.0  # when the next line is due at a steady pace; a burst may run ahead of it

        if options.password and not self.payload:
            self.send("PASS", options.password)
        if options.account:
            self.send("CAP", "REQ", "sasl")
        self.send("NICK", self.nick)
        self.send("USER", "fingerd", "0", "*", "A bot, the finger service: send it a user's name")

    def receive(self, raw: bytes, now: float) -> None:
        """Handle a line, which may contain anything."""
        self.now, self.heard = now, True
        line = parse_irc_line(raw)
        prefix = "on_our_" if self.is_me(line.source.partition("!")[0]) else "on_"
        getattr(self, prefix + line.command, self.on_other)(line)
        self.last_line = line

    def tick(self, now: float) -> None:
        """Do what is due at `now`."""
        self.now = now
        if now >= self.due:
            self.keep_alive()
        self.join()
        self.announce()

    def keep_alive(self) -> None:
        """Check that the server replies, and ask for our nick again if we have another one."""
        if not self.registered or not self.heard:
            raise ConnectionError("the server does not register us, or no longer replies")
        self.settled, self.heard = True, False
        self.due = self.now + IRC_KEEP_ALIVE_SECONDS
        self.askers.clear()
        self.send("PING", "fingerd")
        if not self.is_me(self.options.nick):
            self.send("NICK", self.options.nick)

    def join(self) -> None:
        """Ask for the channels that are due."""
        for channel in self.channels.values():
            if not channel.joined and channel.due <= self.now:
                self.send("JOIN", *filter(None, [channel.name, channel.key]))
                channel.due = self.now + channel.pause
                channel.pause = min(2 * channel.pause, IRC_LONGEST_RETRY_SECONDS)

    def announce(self) -> None:
        """Tell the channels in a few lines which statuses have changed since the last time."""
        joined = [channel.name for channel in self.channels.values() if channel.joined]
        if self.queue or not joined:  # the changes wait, and are announced together later
            return
        latest = {}
        for version, user, text in self.store.changes_after(self.version):
            self.version, latest[user] = version, text
        lines = [f"{user}: {text}" for user, text in latest.items()]
        if len(lines) > IRC_ANNOUNCED:
            lines[IRC_ANNOUNCED:] = [f"and {len(lines) - IRC_ANNOUNCED} more"]
        for line, channel in itertools.product(lines, joined):
            self.say(channel, line)

    def take(self, now: float) -> bytes:
        """The lines that may be sent now, at the pace of RFC 1459, section 8.10."""
        taken = b""
        while self.queue and self.pace <= now + (IRC_BURST_LINES - 1) * IRC_LINE_SECONDS:
            taken += self.queue.popleft()
            self.pace = max(self.pace, now) + IRC_LINE_SECONDS
        return taken

    def send(self, command: str, *params: str) -> None:
        self.queue.append(format_irc_line(command, *params))

    def say(self, target: str, text: str) -> None:
        """Queue a text, cut to fit one line, without leading signs that command other bots."""
        text = re.sub(r"^[!.,@+?~%&$;`\\ -]+(?=[^\W\d_])", "", text)
        room = IRC_TEXT_BYTES - len(target.encode())
        text = text.encode()[:room].decode("utf-8", "ignore")
        if len(self.queue) < IRC_QUEUE_LINES:  # a full queue would drop an older line
            self.send("PRIVMSG", target, text)

    def is_me(self, nick: str) -> bool:
        return nick.lower() == self.nick.lower()

    def quote(self, *words: str) -> str:
        """The server's words for the log, with *** for our secrets."""
        text = clean(" ".join(words))
        for secret in filter(None, self.secrets):
            text = text.replace(secret, "***")
        return text[:200]

    def on_PING(self, line: IrcLine) -> None:
        self.queue.appendleft(format_irc_line("PONG", line.param(0)))

    def on_ERROR(self, line: IrcLine) -> None:
        """End the session: ERROR, a refused log-in, a wrong server password (464), a ban (465)."""
        raise ConnectionError(f"the server says: {self.quote(line.command, *line.params)}")

    on_464 = on_465 = on_902 = on_904 = on_905 = on_906 = on_908 = on_ERROR

    def on_CAP(self, line: IrcLine) -> None:
        reply = " ".join(line.params[1:]).split()
        if reply == ["ACK", "sasl"]:
            self.send("AUTHENTICATE", "EXTERNAL" if self.options.certificate else "PLAIN")
        elif reply == ["NAK", "sasl"]:
            raise ConnectionError("the server refuses SASL")

    def on_AUTHENTICATE(self, line: IrcLine) -> None:
        self.send("AUTHENTICATE", self.payload or "+")

    def on_903(self, line: IrcLine) -> None:
        self.logged_in = True
        self.send("CAP", "END")

    def on_433(self, line: IrcLine) -> None:
        """The nick is taken or not allowed, perhaps for its length: try another one, once."""
        nick = self.options.nick
        other_nick = nick[:8] + ("-" if nick[8:] == "_" else "_")  # 9 characters: RFC 2812, 1.2.1
        if self.registered:
            self.on_other(line)
        elif self.nick == other_nick:
            raise ConnectionError("the server accepts none of our nicks")
        else:
            self.nick = other_nick
            self.send("NICK", self.nick)

    on_432 = on_436 = on_437 = on_433

    def on_001(self, line: IrcLine) -> None:
        if not self.logged_in:
            raise ConnectionError("the server has no SASL")
        self.registered, self.nick = True, line.param(0)
        self.report(f"registered as {self.quote(self.nick)}")
        self.send("CAP", "REQ", "message-tags")  # one of them marks bots
        for channel in self.channels.values():  # a bouncer may have connected to its server again
            channel.joined, channel.due = False, self.now
        self.join()

    def on_our_NICK(self, line: IrcLine) -> None:
        self.nick = line.param(0)

    def on_our_JOIN(self, line: IrcLine) -> None:
        """We have joined a channel. Leave it if it replaced one of ours by a forward (470)."""
        channel, last = self.channels.get(line.param(0).lower()), self.last_line
        if channel:
            channel.joined, channel.pause = True, IRC_KEEP_ALIVE_SECONDS
            self.report(f"joined {channel.name}")
        elif last.command == "470" and last.param(1).lower() in self.channels:
            self.send("PART", line.param(0))

    def on_other(self, line: IrcLine) -> None:
        """Log the first error of each kind about one of our channels; `join` will try again."""
        channel, kind = self.channels.get(line.param(1).lower()), line.command
        if channel and re.fullmatch("[459]..", kind) and (channel, kind) not in self.refusals:
            self.refusals.add((channel, kind))
            self.report(f"{channel.name} refuses us ({kind}): {self.quote(*line.params[2:])}")

    def on_KICK(self, line: IrcLine) -> None:
        """We have left. Join again after a PART; after a KICK, only on INVITE or reconnection."""
        channel, kicked = self.channels.get(line.param(0).lower()), line.command == "KICK"
        if channel and (self.is_me(line.param(1)) or not kicked):
            channel.joined = False
            channel.due = math.inf if kicked else self.now + IRC_KEEP_ALIVE_SECONDS
            self.report(self.quote("out of a channel:", line.source, line.command, *line.params))

    on_our_PART = on_our_KICK = on_KICK

    def on_INVITE(self, line: IrcLine) -> None:
        channel = self.channels.get(line.param(1).lower())
        if channel and self.is_me(line.param(0)) and self.within_limit(line):
            channel.due = self.now

    def on_PRIVMSG(self, line: IrcLine) -> None:
        """Reply to a person who writes to us or in one of our channels."""
        target, text = line.param(0), line.param(1)
        private = self.is_me(target)
        if is_person(line) and (private or target.lower() in self.channels):
            reply = self.finger_reply(text, private)
            if reply and self.within_limit(line):
                self.say(line.source.partition("!")[0] if private else target, reply)

    def finger_reply(self, text: str, private: bool) -> str:
        """The reply to `!finger NAME`, `fingerbot: NAME` or, in private, `NAME`; else ""."""
        call = rf"(?:!finger |{re.escape(self.nick)}[:,] )" + ("?" if private else "")
        query = re.fullmatch(f"{call} *(.+)", clean(text), re.IGNORECASE)
        now = self.store.now
        replies = (NO_SUCH_USER, now.get(now.find(self.nick)).text)  # of fingerd, about our nick
        # Not queries: such replies, CTCP, and lines that ZNC plays back with a time.
        if not query or query[1] in replies or re.search(r"^\x01|\[\d\d:\d\d:\d\d\]", text):
            return ""
        user = now.find(query[1])
        return f"{user or query[1][:MAX_NAME]}: {now.get(user).text or NO_SUCH_USER}"

    def within_limit(self, line: IrcLine) -> bool:
        """Count a query; False if its sender has sent too many since the last keep-alive."""
        asker = line.source.partition("!")[2]
        self.askers.append(asker)
        return self.askers.count(asker) <= IRC_QUERIES


# ================================================================================================
# 5. services: all sockets, threads and clocks; most services share only the store
# ================================================================================================


# ---- connections -------------------------------------------------------------------------------


class Reply(NamedTuple):
    """The answer of a server to the bytes that it has received."""

    pieces: list[bytes]  # sent one after the other; never changed, so connections can share them
    used: int  # how many received bytes it answers
    close: bool  # whether it is the last reply


Job = Callable[[], Reply]  # computes a reply in a worker thread, where it may block

WAITING, WORKING, CLOSED = "waiting", "working", "closed"

# The flags to send the last piece of a last reply. The end of the stream follows at once; where
# there is MSG_MORE, both travel in one packet: this saves a seventh of an answer's CPU time.
SEND_LAST = socket.MSG_DONTWAIT | getattr(socket, "MSG_MORE", 0)


def plain_address(address: Any) -> str:
    """The IP address in a socket's `address`; an IPv4 one as such, also on an IPv6 socket."""
    host: str = address[0]
    return host[7:] if host.startswith("::ffff:") else host


class Connection:
    """The connection of one client, which is always in one of three states.

    state    owner     leaves the state when
    -------  --------  --------------------------------------------------------------------------
    waiting  the loop  the reply needs a job: working. The client closes after the last reply, or
                       earlier; the deadline passes; it is evicted: closed.
    working  a worker  the job has computed the reply: waiting. STOP_SECONDS after the server
                       was told to stop: closed.
    closed   nobody

    The loop is the thread of the connection's server, and it alone uses the socket. A connection
    waits for a request, for room to send more of a reply, or, after the last reply, for the client
    to close as well.
    """

    state = WAITING
    events = 0  # a mask of what the selector watches for; 0 if it is not registered
    network = b""  # the client's network; b"" until the connection has to wait
    received = b""  # bytes that no reply answers yet
    pipelined = False  # whether `received` may hold a whole request: parse it before recv
    ended = False  # whether the end of the client's stream was received
    result: Reply | None = None  # of the job
    unsent: list[bytes | memoryview] = []  # of the reply that is being sent
    closing = False  # whether `unsent` belongs to the last reply
    drain = 0  # bytes that may still be dropped after the last reply

    def __init__(self, sock: socket.socket, address: Any, deadline: float) -> None:
        self.sock, self.address = sock, address
        self.deadline = deadline  # of the state `waiting` (time.monotonic())

    def __str__(self) -> str:
        return plain_address(self.address)


def network_of(host: str) -> bytes:
    """The key that connections are counted by: an IPv4 address, or the /64 of an IPv6 one."""
    if ":" not in host:
        return host.encode()
    return socket.inet_pton(socket.AF_INET6, host.partition("%")[0])[:8]


def choose_evicted(
    candidates: Iterable[Connection], sizes: collections.Counter[bytes], count: int
) -> list[Connection]:
    """Up to `count` connections to evict: the longest idle ones of the networks that have most.

    `candidates` begins with the longest idle one; `sizes` says how many connections each network
    has.
    """
    networks = collections.Counter(sizes.values())  # how many networks have each size
    limit, networks_above, excess = max(networks, default=0), 0, 0
    while limit and excess < count:  # lower the limit until enough connections are above it
        networks_above += networks[limit]
        limit, excess = limit - 1, excess + networks_above
    left, chosen = sizes.copy(), []
    for connection in candidates:
        if left[connection.network] > limit:
            left[connection.network] -= 1
            chosen.append(connection)
            if len(chosen) == count:
                break
    return chosen


# ---- servers -----------------------------------------------------------------------------------


class Site(NamedTuple):
    """What all servers share."""

    store: StatusStore
    policy: Policy = Policy()
    plans: Plans | None = None
    refresh: Callable[[], object] = bool  # called before a message is set


class Server(socketserver.ThreadingTCPServer):
    """What the finger, setter and web servers share: a loop, and worker threads for long jobs.

    `serve_forever` is the loop. It waits on a selector that watches the listener, the connections
    and the ends of jobs. Each subclass implements the method `reply`.
    """

    daemon_threads = True
    block_on_close = False
    name = ""
    seconds = 0.0  # in which a request must arrive, from the start of the wait for it
    ceiling = CONNECTIONS
    fault = b""  # the reply if `reply` or a job raises an exception

    def __init__(self, listener: socket.socket, site: Site) -> None:
        super().__init__(listener.getsockname(), socketserver.BaseRequestHandler, False)
        self.socket.close()
        self.socket, self.site = listener, site
        listener.setblocking(False)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it
        if hasattr(socket, "TCP_DEFER_ACCEPT"):  # accepted when a query is there, or after 1 s
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 1)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # else the kernel holds 100 kB for each
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        self.connections: dict[Connection, None] = {}  # all that had to wait; longest idle first
        self.sizes: collections.Counter[bytes] = collections.Counter()  # of them, by network
        self.long: dict[Connection, None] = {}  # with a long incomplete request; longest idle first
        self.readers: dict[Connection, float] = {}  # with an unsent reply; when some was taken
        self.may_evict = True  # False if a search in this turn found none
        self.ready: collections.deque[Connection] = collections.deque()  # serve them in this turn
        self.handed_back: collections.deque[Connection] = collections.deque()  # serve in the next
        # The jobs that wait, by network; the first network has the next turn.
        self.jobs: dict[bytes, collections.deque[tuple[Connection, Job]]] = {}
        self.workers = 0
        self.wakened, self.waker = socket.socketpair()
        self.waker.setblocking(False)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.wakened, selectors.EVENT_READ)
        self.selector.register(listener, selectors.EVENT_READ)
        self.next_complaint = 0.0  # when cannot_accept may log again
        self.stopping = False

    def reply(self, received: bytes, ended: bool, connection: Connection) -> Reply | Job | None:
        """The reply to the bytes in `received`; no more follow if `ended`.

        None if the request is incomplete; a job if the reply takes long to compute. Never blocks.
        """
        raise NotImplementedError

    # The hooks of socketserver. `serve_forever` calls service_actions, which waits and serves.

    def get_request(self) -> tuple[Any, Any]:
        """The next connection that is ready, else a new one; OSError if there is none."""
        if self.ready:
            connection = self.ready.popleft()
            return connection, connection.address
        try:
            sock, address = self.socket.accept()
        except OSError as problem:
            if not isinstance(problem, (BlockingIOError, ConnectionError)):
                self.cannot_accept(problem)
            raise
        return Connection(sock, address, time.monotonic() + self.seconds), address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection as far as that is possible without waiting for its client."""
        connection: Connection = request
        if connection.network and self.go_on(connection):
            return
        if not connection.pipelined:
            try:
                chunk = connection.sock.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                self.wait(connection)
                return
            connection.ended = not chunk
            connection.received += chunk
            if len(chunk) == RECEIVE_BYTES:  # more may be there: see the end of `send`
                self.wait(connection)
        connection.pipelined = False
        reply = self.reply(connection.received, connection.ended, connection)
        if isinstance(reply, Reply):
            self.send(connection, reply)
        elif reply:
            self.begin_job(connection, reply)
        elif connection.ended:
            self.shutdown_request(connection)
        else:
            self.wait(connection)

    def service_actions(self) -> None:
        """Serve connections for TURNS_SECONDS; then close those whose clients take too long."""
        now = time.monotonic()
        until = now + TURNS_SECONDS
        while now < until:
            self.turn(until - now)
            now = time.monotonic()
        for connection in list(self.connections):
            if connection.state == WAITING and connection.deadline < now:
                self.shutdown_request(connection)
        if len(self.readers) > HEAVY:
            slow = [each for each, taken in self.readers.items() if taken < now - TAKE_SECONDS]
            self.close_some(slow, len(self.readers) - HEAVY)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log the exception: an OSError is the client's, any other is a bug here."""
        problem = sys.exc_info()[1]
        if isinstance(problem, OSError):
            log.debug("%s: %s: %s", self.name, request, problem)
        else:
            log.exception("%s: %s", self.name, INTERNAL_ERROR)
            with contextlib.suppress(OSError):
                request.sock.send(self.fault, socket.MSG_DONTWAIT)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection, unless it is closed already."""
        connection: Connection = request
        if connection.events:
            self.selector.unregister(connection.sock)
            connection.events = 0
        if connection in self.connections:
            del self.connections[connection]
            self.long.pop(connection, None)
            self.readers.pop(connection, None)
            self.sizes[connection.network] -= 1
            if not self.sizes[connection.network]:
                del self.sizes[connection.network]
        if connection.unsent:
            # A reset: the client sees that the reply is incomplete, and the kernel drops the rest.
            linger = struct.pack("ii", 1, 0)
            with contextlib.suppress(OSError):  # the client has gone
                connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            connection.unsent = []
        connection.state = CLOSED
        connection.sock.close()

    # Waiting for connections.

    def turn(self, seconds: float) -> bool:
        """Wait at most `seconds` for ready connections; serve them, and some new ones.

        Return whether any was ready.
        """
        has_newcomers, self.may_evict = False, True
        for key, _ in self.selector.select(seconds):
            if key.fileobj is self.socket:
                has_newcomers = True
            elif key.fileobj is self.wakened:
                self.wakened.recv(RECEIVE_BYTES)
                while self.handed_back:
                    self.ready.append(self.handed_back.popleft())
            elif key.data.unsent or not key.data.pipelined:  # else it is in handed_back already
                self.ready.append(key.data)
        count = len(self.ready)
        count += has_newcomers * max(NEWCOMERS, count)
        with contextlib.suppress(OSError):  # of get_request
            for _ in range(count):
                request, address = self.get_request()
                try:
                    self.process_request(request, address)
                except Exception:
                    self.handle_error(request, address)
                    self.shutdown_request(request)
        return count > 0

    def cannot_accept(self, problem: OSError) -> None:
        """Log this once a minute at most, and evict a connection to free its descriptor."""
        if time.monotonic() > self.next_complaint:
            self.next_complaint = time.monotonic() + 60
            log.error("%s: cannot accept: %s", self.name, problem.strerror)
        if not self.evict(1):
            time.sleep(0.05)

    def wait(self, connection: Connection, events: int = selectors.EVENT_READ) -> None:
        """Let a connection wait for `events`, or for a worker if `events` is 0."""
        if not connection.network:
            self.add(connection)
        if events != connection.events:
            if not connection.events:
                self.selector.register(connection.sock, events, connection)
            elif events:
                self.selector.modify(connection.sock, events, connection)
            else:
                self.selector.unregister(connection.sock)
            connection.events = events
        self.long.pop(connection, None)
        self.readers.pop(connection, None)
        if connection.unsent:
            self.readers[connection] = time.monotonic()
        elif events and len(connection.received) > LIGHT_BYTES:
            self.long[connection] = None
            if len(self.long) > HEAVY:
                self.close_some(list(self.long), 1 + HEAVY // 20)

    def close_some(self, candidates: list[Connection], count: int) -> None:
        """Close up to `count` of the candidates, which begin with the longest idle one."""
        sizes = collections.Counter(connection.network for connection in candidates)
        for connection in choose_evicted(candidates, sizes, count):
            self.shutdown_request(connection)

    def add(self, connection: Connection) -> None:
        """Add a connection to those that wait or work; evict others if there are too many."""
        if len(self.connections) >= self.ceiling and not self.evict(1 + self.ceiling // 100):
            raise ConnectionAbortedError("too many connections")
        connection.network = network_of(str(connection))
        self.connections[connection] = None
        self.sizes[connection.network] += 1

    def evict(self, count: int) -> bool:
        """Close up to `count` connections that wait; returns whether there were any.

        A connection whose next bytes have arrived is kept. One with an unsent reply is closed
        only if there is no other.
        """
        if not self.may_evict:
            return False
        arrived = {key.data for key, _ in self.selector.select(0)}
        arrived.update(self.ready, self.handed_back.copy())  # workers append to the latter

        def waiting(is_slow: bool) -> Iterator[Connection]:
            for each in self.connections:
                if each.state == WAITING and each not in arrived and bool(each.unsent) == is_slow:
                    yield each

        candidates = choose_evicted(waiting(False), self.sizes, count)
        if len(candidates) < count / 2:  # the largest networks hardly wait: look at all
            candidates = [*waiting(False)] or [*waiting(True)]
        self.close_some(candidates, count)
        self.may_evict = bool(candidates)
        return self.may_evict

    # Replies.

    def go_on(self, connection: Connection) -> bool:
        """Go on with what a connection has begun; False if it waits for a request."""
        if connection.result:
            self.end_job(connection, connection.result)
        elif connection.state == CLOSED:
            pass  # it was evicted in this turn
        elif connection.unsent:
            self.send(connection)
        elif connection.drain:
            self.drop(connection)
        else:
            return False
        return True

    def send(self, connection: Connection, reply: Reply | None = None) -> None:
        """Send as much of a new reply, or of the one that was begun, as the client takes now."""
        if reply:
            connection.received = connection.received[reply.used :]
            connection.closing = reply.close or self.stopping
            answered = reply.used > 0 and not connection.closing
            connection.pipelined = answered and connection.received != b""
            connection.unsent = [*reply.pieces]
        piece = connection.unsent.pop(0)
        is_last = connection.closing and not connection.unsent
        try:
            sent = connection.sock.send(piece, SEND_LAST if is_last else socket.MSG_DONTWAIT)
        except BlockingIOError:
            sent = 0
        if sent < len(piece):
            connection.unsent.insert(0, memoryview(piece)[sent:])
        if connection.unsent:
            latest, earned = time.monotonic() + SEND_SECONDS, sent / SLOWEST_READER
            connection.deadline = latest if reply else min(latest, connection.deadline + earned)
            self.wait(connection, selectors.EVENT_WRITE)
        elif not connection.closing:
            self.await_request(connection)
        else:
            connection.sock.shutdown(socket.SHUT_WR)  # now a late byte cannot discard the reply
            all_at_once = not (connection.received or connection.network)  # more is unlikely
            if connection.ended or self.stopping or all_at_once:
                self.shutdown_request(connection)
            else:
                self.await_end(connection)

    def await_request(self, connection: Connection) -> None:
        """Wait for the client's next request."""
        connection.deadline = time.monotonic() + self.seconds
        self.wait(connection)
        self.connections[connection] = self.connections.pop(connection)  # it moves to the end
        if connection.pipelined:  # others are served first
            self.hand_back(connection)

    def await_end(self, connection: Connection) -> None:
        """Wait for the client to close: an earlier close could cause a reset and lose the reply."""
        connection.drain, connection.deadline = DRAIN_BYTES, time.monotonic() + DRAIN_SECONDS
        self.wait(connection)

    def drop(self, connection: Connection) -> None:
        """Drop bytes that arrive after the last reply."""
        size = len(connection.sock.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT))
        connection.drain -= size
        if not size or connection.drain <= 0:
            self.shutdown_request(connection)

    # Jobs.

    def begin_job(self, connection: Connection, job: Job) -> None:
        """Let a worker compute the reply to a connection, as soon as one is free."""
        self.wait(connection, 0)
        if len(connection.received) > LIGHT_BYTES:
            own = len(self.jobs.get(connection.network, ()))
            if own >= LONG_JOBS or sum(map(len, self.jobs.values())) >= HEAVY:
                raise ConnectionAbortedError("too many jobs for a long request")
        connection.state = WORKING
        self.jobs.setdefault(connection.network, collections.deque()).append((connection, job))
        self.start_workers()

    def start_workers(self) -> None:
        """Start a worker for each job that has none, up to WORKERS; networks take turns."""
        while self.jobs and self.workers < WORKERS:
            network = next(iter(self.jobs))
            jobs = self.jobs.pop(network)
            request: Any = jobs.popleft()
            if jobs:
                self.jobs[network] = jobs
            self.workers += 1
            try:
                super().process_request(request, None)
            except RuntimeError:  # no thread can be started: do the job in the loop
                self.process_request_thread(request, None)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """In a worker: compute a reply, and hand its connection back to the loop."""
        connection, job = request
        try:
            connection.result = job()
        except Exception:
            log.exception("%s: %s", self.name, INTERNAL_ERROR)
            connection.result = Reply([self.fault], 0, close=True)
        self.hand_back(connection)

    def hand_back(self, connection: Connection) -> None:
        """Let the loop serve a connection in its next turn; callable from any thread."""
        self.handed_back.append(connection)
        with contextlib.suppress(OSError):  # the buffer is full, or the server has ended
            self.waker.send(b"\0")

    def end_job(self, connection: Connection, reply: Reply) -> None:
        """Send the reply that a worker has computed."""
        self.workers -= 1
        self.start_workers()
        connection.result = None
        if connection.state == WORKING:  # else it was closed meanwhile
            connection.state = WAITING
            self.send(connection, reply)

    # The end.

    def run(self) -> None:
        """Serve until `shutdown`, then for STOP_SECONDS at the most.

        Answer the queries that have arrived, close the listener, and finish the replies begun.
        """
        self.serve_forever(0)  # 0: socketserver's own poll does not wait; service_actions does
        deadline = time.monotonic() + STOP_SECONDS
        while self.turn(0) and time.monotonic() < deadline - STOP_SECONDS / 2:
            pass
        self.stopping = True
        self.selector.unregister(self.socket)
        self.socket.close()
        for connection in list(self.connections):
            if connection.state == WAITING and not connection.unsent:
                self.shutdown_request(connection)
        while self.connections and time.monotonic() < deadline:
            self.service_actions()
        for connection in list(self.connections):
            self.shutdown_request(connection)
        for each in (self.selector, self.wakened, self.waker):
            each.close()


class FingerServer(Server):
    """Answers finger queries: one line in, the answer out (RFC 1288)."""

    name, seconds = "finger", 10.0
    fault = f"{INTERNAL_ERROR}\r\n".encode()

    def __init__(self, listener: socket.socket, site: Site) -> None:
        super().__init__(listener, site)
        self.lists: dict[FingerQuery, tuple[int, bytes]] = {}  # with the store's version

    def reply(self, received: bytes, ended: bool, connection: Connection) -> Reply | Job | None:
        """The answer to a query; a job if a plan must be looked for or a long list must be made."""
        query = parse_finger(received, ended)
        if query is None:
            return None
        log.debug("finger: %s: %a", connection, query.user)
        store, policy, plans, _ = self.site
        now = store.now
        if query.host and is_ours(query.host, plain_address(connection.sock.getsockname()), policy):
            query = query._replace(host=None)
        if query.too_long or query.host is not None or (query.user and not plans):
            text = finger_answer(now, query, policy)
            return Reply([text.encode()], len(received), close=True)
        version, listed = self.lists.get(query, (-1, b""))
        if version == now.version:
            return Reply([listed], len(received), close=True)

        def answer() -> Reply:
            plan = plans.read(query.user) if plans and query.user else ""
            text = finger_answer(now, query, policy, plan).encode()
            if not query.user:
                self.lists[query] = now.version, text
            return Reply([text], len(received), close=True)

        return answer if query.user or now.size() > MAX_SHORT_LIST else answer()


SOCK_DIAG_BY_FAMILY, NETLINK_SOCK_DIAG = 20, 4  # of linux/sock_diag.h and linux/netlink.h


def account_name(uid: int) -> str:
    """The name of the account; a dynamic user of systemd may have none here."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def find_owner(client: Any, server: Any) -> int | None:
    """The uid that has the socket connected from `client` to `server`, if it is on this machine.

    Only Linux tells it: see sock_diag(7). The answer takes 20 us.
    """
    if not hasattr(socket, "AF_NETLINK"):
        return None
    ends = [plain_address(end).partition("%")[0] for end in (client, server)]
    family = socket.AF_INET6 if ":" in ends[0] else socket.AF_INET
    hosts = [socket.inet_pton(family, host) for host in ends]
    ports = [socket.htons(client[1]), socket.htons(server[1])]
    # A header (size, type, flag for a request); a protocol, in any state; the socket, no cookie.
    question = struct.pack("=I2H2I", 72, SOCK_DIAG_BY_FAMILY, 1, 0, 0)
    question += struct.pack("=4BI", family, socket.IPPROTO_TCP, 0, 0, 0xFFFFFFFF)
    try:
        # The interface of a link-local address, else that of traffic within the machine.
        interface = (*client, 0, 0)[3] or socket.if_nametoindex("lo")
        question += struct.pack("=2H16s16sI8s", *ports, *hosts, interface, b"\xff" * 8)
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as kernel:
            kernel.send(question)
            answer = kernel.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT)
    except OSError:
        return None
    kind, *found, uid, inode = struct.unpack_from("=4xH14x2H56x2I", answer.ljust(88, b"\0"))
    # A listener has no second port; a socket that its client has closed has no inode.
    return uid if kind == SOCK_DIAG_BY_FAMILY and found == ports and inode else None


class SetterServer(Server):
    """Sets a user's message for anyone who can connect.

    A users file on disk is read first, so that an edit made before the set does not undo it.
    """

    name, seconds = "setter", 60.0
    fault = f"ERROR {INTERNAL_ERROR}\r\n".encode()

    def reply(self, received: bytes, ended: bool, connection: Connection) -> Reply | Job | None:
        """`ERROR` and a reason, or a job that sets the message and answers `OK` or `ERROR`."""
        setting = parse_setting(received, ended, time.time())
        if setting is None:
            return None

        def answer(line: str) -> Reply:
            log.debug("setter: %s: %a: %a: %s", connection, setting.user, setting.text, line)
            return Reply([f"{line}\r\n".encode()], len(received), close=True)

        if setting.problem:
            return answer(f"ERROR {setting.problem}")
        owner = find_owner(connection.address, connection.sock.getsockname())
        connection.sock.getpeername()  # OSError after a reset: another client may have the port
        return lambda: answer(self.keep_message(setting, str(connection), owner))

    def keep_message(self, setting: Setting, address: str, owner: int | None) -> str:
        """Set the message, and log by whom; returns the answer to the client."""
        account = "" if owner is None else account_name(owner)
        by = account or address
        try:
            self.site.refresh()
            user = self.site.store.set(setting.user, setting.text, by, setting.until)
        except NotKept as problem:
            return f"ERROR {problem}"
        action = "set" if setting.text else "taken back"
        end = f" until {plain_time(setting.until)}" if setting.until else ""
        log.info("setter: %a %s by %s%s", user, action, by, end, extra={"account": account})
        if self.site.store.lost_at_restart:
            end = f"{end} or fingerd restarts" if end else " until fingerd restarts"
        return f"OK{end}"


class WebHandler(http.server.BaseHTTPRequestHandler):
    """Answers one web request; as the library documents, do_GET answers a GET, and so on.

    Two things of the library are replaced. Its request parser accepts requests that a proxy in
    front may read otherwise: here `parse_http_request` has read the request. Its files would
    block: here the server's loop receives and sends, so a do_ method returns its page, or a
    function that makes the page if that takes long.
    """

    request: HttpRequest
    server: WebServer

    def setup(self) -> None:
        """Do nothing; the library would open files here, and close them in `finish`."""

    finish = setup

    def handle(self) -> None:
        refusal = self.server.answers.refusal(self.request)
        answer: Any = refusal or getattr(self, f"do_{self.request.method}")()
        is_page = isinstance(answer, Page)
        self.reply = self.respond(answer) if is_page else lambda: self.respond(answer())

    def respond(self, page: Page) -> Reply:
        """The reply with a page."""
        request, path = self.request, self.request.path[:MAX_NAME]
        log.debug("web: %s: %s %a: %d", self.client_address, request.method, path, page.status)
        pieces = self.server.answers.response(request, page, time.time())
        return Reply(pieces, request.size, not request.keep)

    def do_GET(self) -> Page | Callable[[], Page]:
        answers, now = self.server.answers, self.server.site.store.now
        if answers.takes_long(self.request, now):
            return self.list_page
        if self.server.site.plans and self.request.path != "/":
            return self.plan_page
        return answers.page(self.request, now)

    do_HEAD = do_GET  # the response leaves out the body

    def list_page(self) -> Page:
        """The list of all users; one thread makes it, for all that wait for it."""
        with self.server.listing:
            return self.server.answers.page(self.request, self.server.site.store.now)

    def plan_page(self) -> Page:
        """The page of a user, whose plan is read from the disk."""
        plan = self.server.read_plan(self.request.user)
        return self.server.answers.page(self.request, self.server.site.store.now, plan)

    def do_POST(self) -> Page | Callable[[], Page]:
        content_type = self.request.headers.get("content-type", "")
        rpc, body = self.server.rpc, self.request.body or b""
        if len(body) > MAX_SHORT_CALL:
            return lambda: rpc.page(parse_rpc_call(body, content_type))
        answer = rpc.short_answer(body, content_type, self.server.site.store.now.version)
        return answer if isinstance(answer, Page) else lambda: rpc.page(answer)

    def do_OPTIONS(self) -> Page:
        return Page(204, ALLOWED)


class WebServer(Server):
    """Serves the pages, and XML-RPC at /RPC2."""

    name, seconds = "web", 15.0
    fault = b"HTTP/1.1 500 Error\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"

    def __init__(self, listener: socket.socket, site: Site) -> None:
        super().__init__(listener, site)
        self.read_plan = site.plans.read if site.plans else lambda _: ""
        self.answers = WebAnswers(site.store, site.policy)
        self.rpc = RpcAnswers(site.store, site.policy, self.read_plan)
        self.listing = threading.Lock()  # held while a list of all users is made

    def reply(self, received: bytes, ended: bool, connection: Connection) -> Reply | Job | None:
        """The response to the first request in `received`."""
        request: Any = parse_http_request(received)  # Any: WebHandler takes it in place of a socket
        if request is None:
            return None
        if request.body is None:
            if ended or not request.expects or len(received) > request.size:
                return None
            if not self.answers.refusal(request):
                return Reply([b"HTTP/1.1 100 Continue\r\n\r\n"], 0, close=False)
        if request.body is None or len(self.connections) > self.ceiling * 7 // 8:
            request = request._replace(keep=False)  # it may never come; or they are scarce
        return WebHandler(request, connection, self).reply


# ---- the users file ----------------------------------------------------------------------------


def read_users(data: bytes, known: Mapping[str, str]) -> UsersFile:
    """The users in a users file or in a list in JSON; OSError if it is something else."""
    if b"\0" in data[: 2 * MAX_NAME + 4]:  # as far as the first name and its colon reach
        raise OSError("in UTF-16, not in UTF-8")
    if data.startswith((b'[{"user"', b"[]\n")):  # what json_list begins with
        if not data.endswith(b"]\n"):
            raise OSError("an incomplete list")
        users = parse_json_list(data, known, time.time())
    else:
        users = parse_users(map(clean_line, io.BytesIO(data)), known)
    if len(users.texts) > MAX_USERS:
        raise OSError(f"more than {MAX_USERS} users")
    return users


class FileSource:
    """The users file on disk."""

    def __init__(self, path: pathlib.Path) -> None:
        self.name, self._path = str(path), path.absolute()
        self._seen: tuple[int, ...] = ()  # what `_look` returned when the file was read last

    def _look(self) -> tuple[int, ...]:
        """A value that differs after every change; () if the file changed a moment ago."""
        found = self._path.stat()
        if not stat.S_ISREG(found.st_mode):  # opening a device may have any effect
            raise OSError("not a regular file")
        if found.st_size > MAX_FILE:
            raise OSError(f"larger than {MAX_FILE} bytes")
        if 0 <= time.time() - found.st_mtime < SETTLE_SECONDS:
            return ()
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

    def read(self, known: Mapping[str, str], at_once: bool) -> UsersFile | None:
        """The users file, or None if it has not changed since the last read; may raise OSError.

        A file that is being written counts as unchanged. If `at_once`, it is read in any case.
        """
        try:
            before = self._look()
            if not before and not at_once:
                time.sleep(SETTLE_SECONDS)
                before = self._look()
            if before in ((), self._seen) and not at_once:
                return None
            users = read_users(self._path.read_bytes(), known)
            if self._look() != before and not at_once:
                return None
            self._seen = before
            modified = max(0.0, min(self._path.stat().st_mtime, time.time()))
            return users._replace(modified=modified)
        except OSError as problem:
            words = problem.strerror or problem
            if isinstance(problem, PermissionError):
                words = f"{words} for {account_name(os.geteuid())}{RUN_AS_HINT}"
            raise OSError(f"{self.name}: {words}") from None


def http_get(url: str, headers: dict[str, str]) -> tuple[http.client.HTTPResponse, bytes]:
    """The response to a GET, and its body; TimeoutError after FETCH_SECONDS once connected."""
    parts, body = urllib.parse.urlsplit(url), bytearray()
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.netloc, timeout=FETCH_SECONDS)
    connection.connect()
    connection.sock.settimeout(None)  # from here on, only the timer ends a read
    end = time.monotonic() + FETCH_SECONDS
    cut_off = socket.socket.shutdown  # of the TCP socket: SSLSocket.shutdown is not thread-safe
    timer = threading.Timer(FETCH_SECONDS, cut_off, [connection.sock, socket.SHUT_RDWR])
    timer.daemon = True
    timer.start()
    try:
        query = f"?{parts.query}" if parts.query else ""
        connection.request("GET", (parts.path or "/") + query, headers=headers)
        response = connection.getresponse()
        for block in iter(lambda: response.read(BLOCK_BYTES), b""):
            body += block
            if len(body) > MAX_FILE:
                raise OSError(f"larger than {MAX_FILE} bytes")
    finally:
        timer.cancel()
        connection.close()
        if time.monotonic() >= end:
            raise TimeoutError("timed out")
    if response.length:
        raise OSError(f"broke off after {len(body)} bytes")
    return response, bytes(body)


class UrlSource:
    """A users file on a web server, usually the list of another fingerd.

    Its last content is kept in the file `copy`, if any, for a start when the server is down. No
    redirect is followed, and the proxies that the environment names are not used.
    """

    def __init__(self, url: str, copy: pathlib.Path | None) -> None:
        self.name, self._copy = url, copy
        self._etag = ""  # of the list that the server sent last
        self._last: UsersFile | None = None  # the list that `read` returned last

    def read(self, known: Mapping[str, str], at_once: bool) -> UsersFile | None:
        """The list, or None if it has not changed since the last read; may raise OSError.

        If `at_once`, it is transferred in any case. If the first call fails, the copy is read.
        """
        try:
            users = self._ask("" if at_once else self._etag, known)
        except (OSError, ValueError, http.client.HTTPException) as problem:
            words = f"{self.name}: {clean(str(problem))[:MAX_STATUS]}"
            if self._last or not self._copy or self._copy.is_symlink() or not self._copy.exists():
                raise OSError(words) from None
            log.warning("%s; starting with the copy in %s", words, self._copy)
            users = FileSource(self._copy).read(known, at_once=True)
        self._last = users or self._last
        return users

    def _ask(self, etag: str, known: Mapping[str, str]) -> UsersFile | None:
        """The server's list; after a 304, None unless the list has a new date.

        The Last-Modified of a fingerd is the full second after its last change. It is missing
        until then, so a later 304 answer may be the first with it.
        """
        headers = {"User-Agent": f"fingerd/{__version__}"}
        headers["Accept"] = "application/json, text/plain;q=0.5"
        if etag:
            headers["If-None-Match"] = etag
        response, body = http_get(self.name, headers)
        now, found = time.time(), response.headers
        modified = parse_http_time(found["Last-Modified"] or "") - 1
        is_dated = 0 <= modified <= now + MAX_SKEW
        if response.status == http.HTTPStatus.NOT_MODIFIED and etag and self._last:
            is_newer = is_dated and modified != self._last.modified
            return self._last._replace(modified=modified) if is_newer else None
        media_type = found.get_content_type()
        if response.status != http.HTTPStatus.OK or media_type == "text/html":
            raise OSError(f"status {response.status}, {media_type}, instead of a list of users")
        users = read_users(body, known)._replace(modified=modified if is_dated else now)
        if users.problems and not users.texts:
            raise OSError("no list of users")
        self._keep(body, users.modified)
        self._etag = found["ETag"] or ""
        return users

    def _keep(self, body: bytes, modified: float) -> None:
        """Replace the copy, if one is kept, with `body`; if that fails, the old one remains."""
        if not self._copy:
            return
        new = self._copy.with_name(self._copy.name + ".new")
        try:
            new.unlink(missing_ok=True)
            new.touch(0o600, exist_ok=False)
            with new.open("r+b") as file:
                file.write(body)
                file.flush()
                os.fsync(file.fileno())  # else a crash may leave an empty file
            os.utime(new, (modified, modified))
            os.replace(new, self._copy)
        except OSError as problem:
            log.warning("cannot keep a copy of the users file: %s", problem)


class Reloader(threading.Timer):
    """Reads the users file every `interval` seconds if it has changed, and after each `reload`.

    If the file cannot be read, its last content stays in force, and the reason is logged once.
    """

    def __init__(self, source: FileSource | UrlSource, store: StatusStore, interval: float) -> None:
        super().__init__(interval, self.look)
        self.daemon, self.name = True, "reloader"
        self._source, self._store = source, store
        self._woken, self._reading = threading.Event(), threading.Lock()
        self._problems: list[str] = []  # the bad lines that were logged last

    def run(self) -> None:
        """Look at the file every `interval` seconds and when woken, until cancelled."""
        while not self.finished.wait(0.1):  # ten reloads a second at most
            at_once = self._woken.wait(self.interval)
            self._woken.clear()
            self.look(at_once)

    def reload(self) -> None:
        """Have the thread read the file soon, changed or not."""
        self._woken.set()

    def look(self, at_once: bool = False) -> None:
        """Call `load`; if it fails, store the reason, and log it if it is new."""
        problems, name = self._store.problems, self._source.name
        try:
            self.load(at_once)
            if problems.pop("users file", ""):
                log.info("%s can be read again", name)
        except Exception as problem:
            old, new = problems.get("users file"), str(problem) or repr(problem)
            problems["users file"] = new
            if new != old:
                log.error("%s; the last content of %s stays in force", new, name)

    def load(self, at_once: bool) -> None:
        """Give the store the file if it has changed or `at_once`; raises OSError.

        Bad lines are logged when the content changes or they differ from those logged last.
        """
        with self._reading:
            now, name = self._store.now, self._source.name
            users = self._source.read(now.file, at_once)
            if not users:
                return
            has_times = users.dates is not None
            when = users.modified if has_times or not now.version else time.time()
            is_new = self._store.replace_file(users, when)
            if is_new or users.problems != self._problems:
                self._problems = users.problems
                for problem in users.problems:
                    log.warning("%s:%s", name, problem)
                told = sum(map(bool, users.texts.values()))
                log.info("%s: %d users, %d with a status", name, len(users.texts), told)


def expire_messages(store: StatusStore, finished: threading.Event) -> None:
    """Take back messages within a second or two after they expire, until `finished` is set."""
    while not finished.wait(1.0):
        store.expire(time.time())


# ---- plans -------------------------------------------------------------------------------------


def first_uid() -> int:
    """The lowest uid of people's accounts, as in login.defs(5); system accounts have lower ones."""
    text = ""
    with contextlib.suppress(OSError):
        text = pathlib.Path("/etc/login.defs").read_text("utf-8", "replace")
    found = re.search(r"^\s*UID_MIN\s+([0-9]+)", text, re.MULTILINE)
    return int(found[1]) if found else 1000


class Plans:
    """Reads users' plans: DIR/USER for the directory `place`, or ~/.plan for the `place` "home".

    A plan is read anew each time, by a thread of its own, since a disk may hang. Until that thread
    ends, no other plan is read.
    """

    def __init__(self, place: str, store: StatusStore) -> None:
        self._place, self._store = place, store
        self._turn, self._reader = threading.Lock(), threading.Thread()
        self._first_uid = first_uid()

    def read(self, name: str) -> str:
        """The text of a user's plan; "" if there is none, or if it takes too long."""
        user = self._store.now.find(name) or name
        if entry_problem(user) or "/" in user or user[0] == ".":  # not a plain file name
            return ""
        plan: list[str] = []
        if not self._turn.acquire(timeout=PLAN_SECONDS):  # another plan is slow to read
            return ""
        try:
            if not self._reader.is_alive():
                self._reader = threading.Thread(target=self._load, args=(user, plan), daemon=True)
                self._reader.start()
                self._reader.join(PLAN_SECONDS)
                if self._reader.is_alive():
                    log.warning("plans: the disk does not answer; replies leave the plans out")
        except RuntimeError:  # the system has no thread for it
            pass
        finally:
            self._turn.release()
        return "".join(plan)

    def _load(self, user: str, plan: list[str]) -> None:
        """Append the plan's text to `plan`, unless it is a link, a device or somebody else's."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # opening a FIFO would block
        path, owner = f"{self._place}/{user}", None
        with contextlib.suppress(OSError, KeyError, ValueError):  # or not encodable
            if self._place == "home":
                account = pwd.getpwnam(user)
                path, owner = f"{account.pw_dir}/.plan", account.pw_uid
                is_system = owner < self._first_uid or account.pw_name == "nobody"
                if is_system or os.path.lexists(f"{account.pw_dir}/.nofinger"):
                    return
            with open(path, "rb", opener=lambda name, _: os.open(name, flags)) as file:
                found = os.fstat(file.fileno())
                is_own = found.st_nlink == 1 and owner in (None, found.st_uid)
                if is_own and stat.S_ISREG(found.st_mode) and found.st_mode & stat.S_IROTH:
                    plan.append(parse_plan(file.read(MAX_PLAN + 1)))


# ---- IRC -------------------------------------------------------------------------------------


class StartError(Exception):
    """The service cannot start; the text is the reason, in one line."""


class IrcBot(threading.Thread):
    """Replies to queries on IRC, on one connection after the other, until it is stopped."""

    def __init__(self, options: IrcOptions, store: StatusStore) -> None:
        super().__init__(name="irc", daemon=True)
        self.options, self.store = options, store
        self.stopping = threading.Event()
        self.tls = ssl.create_default_context()
        if options.fingerprint:  # the fingerprint replaces the certificate authorities
            self.tls.check_hostname, self.tls.verify_mode = False, ssl.CERT_NONE
        if options.certificate:
            try:  # with a password, so that nobody is asked for one
                self.tls.load_cert_chain(options.certificate, password="")
            except (OSError, ValueError) as problem:
                text = f"--irc-certificate: not a PEM file with a key: {problem}"
                raise StartError(text) from None

    def run(self) -> None:
        """Connect repeatedly. The back-off grows with each failure until a connection settles."""
        failures, delay, report = 0, 0.0, functools.partial(log.info, "IRC: %s")
        while not self.stopping.wait(delay):
            session = None
            try:
                with self.connect() as sock:
                    session = IrcSession(self.options, self.store, report, time.monotonic())
                    self.serve(sock, session)
            except Exception as problem:  # a bug must not end the bot
                failures = 0 if session and session.settled else failures + 1
                delay = reconnect_delay(failures, os.urandom(1)[0] / 255)
                is_fault = not isinstance(problem, (OSError, UnicodeError))
                log.warning("IRC: %s; next attempt in %.0f s", problem, delay, exc_info=is_fault)

    def connect(self) -> socket.socket:
        """A connection, with TLS if that is wanted, to the first address that accepts one."""
        host, port = self.options.server
        address = host, port or (6697 if self.options.tls else 6667)
        plain = socket.create_connection(address, IRC_CONNECT_SECONDS)
        if not self.options.tls:
            return plain
        try:
            sock = self.tls.wrap_socket(plain, server_hostname=host)  # it closes `plain` on failure
        except OSError as error:
            raise ConnectionError(f"TLS: {error}; see --irc-plaintext, --irc-fingerprint") from None
        digest = hashlib.sha256(sock.getpeercert(binary_form=True) or b"").hexdigest()
        if self.options.fingerprint not in ("", digest):
            sock.close()
            raise ConnectionError(f"the SHA-256 of the server's certificate is {digest}")
        return sock

    def serve(self, sock: socket.socket, session: IrcSession) -> None:
        """Exchange lines until told to stop; OSError if the connection ends earlier."""
        sock.settimeout(0.5)  # the longest wait before the next tick
        unread = b""
        while not self.stopping.is_set():
            sock.sendall(session.take(time.monotonic()))
            with contextlib.suppress(socket.timeout):  # nothing has arrived, or half a TLS record
                received = sock.recv(BLOCK_BYTES)
                if not received:
                    raise ConnectionError("the server closed the connection")
                *lines, unread = (unread + received).split(b"\n")
                for line in lines:
                    session.receive(line, time.monotonic())
                unread = unread[:BLOCK_BYTES]
            session.tick(time.monotonic())
        sock.sendall(format_irc_line("QUIT", "stopped"))


# ---- the process -------------------------------------------------------------------------------

DEFAULT_ADDRESSES = {"finger": "79", "setter": "127.0.0.1:1079", "web": "8000"}  # by server
SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}  # blocked in every thread, for sigwait
URL = re.compile("https?://", re.IGNORECASE)  # the start of a USERS that is on another server


class FloodFilter(logging.Filter):
    """Limits the log lines that clients can cause: FLOOD_LINES of a kind in FLOOD_SECONDS."""

    _ends = 0.0  # the end of the period that is counted

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to write the line; the last one that is written says that more are omitted."""
        if time.monotonic() >= self._ends:
            self._ends = time.monotonic() + FLOOD_SECONDS
            self._counts: collections.Counter[tuple[str, str]] = collections.Counter()
        kind = record.msg, getattr(record, "account", "")  # one account leaves room for others
        self._counts[kind] += 1
        if self._counts[kind] == FLOOD_LINES:
            record.msg += " (more like this are not logged for a while)"
        return self._counts[kind] <= FLOOD_LINES


def is_journal() -> bool:
    """Whether stderr is connected to systemd's journal: see $JOURNAL_STREAM in systemd.exec(5)."""
    if not sys.stderr:
        return False
    status = os.fstat(sys.stderr.fileno())
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class JournalFormatter(logging.Formatter):
    """Begins each line with a priority, as in sd-daemon(3); the journal adds the time."""

    def format(self, record: logging.LogRecord) -> str:
        priority = {"DEBUG": "<7>", "INFO": "<6>", "WARNING": "<4>"}.get(record.levelname, "<3>")
        return priority + super().format(record).replace("\n", f"\n{priority}")


class LogWriter(logging.Handler):
    """Writes log lines to a descriptor in a thread of its own, so that no other thread waits.

    LOG_LINES lines may wait to be written; more are dropped, and the next one says how many.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor, self._dropped = descriptor, 0
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue the line; the library holds a lock meanwhile."""
        if self._lines.qsize() >= LOG_LINES:
            self._dropped += 1
            return
        gap = f" ({self._dropped} lines before this one were dropped)" if self._dropped else ""
        self._lines.put(self.format(record) + gap)
        self._dropped = 0

    def _write(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        for line in iter(self._lines.get, None):
            with contextlib.suppress(OSError):
                os.write(self._descriptor, f"{line}\n".encode("utf-8", "backslashreplace"))

    def close(self) -> None:
        """End the log: wait for the queued lines to be written, but not long."""
        self._lines.put(None)
        self._thread.join(0.5)
        super().close()


def listen(name: str, address: str) -> socket.socket:
    """A listening socket of the server `name`, at an ADDRESS of the command line."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]") or DEFAULT_ADDRESSES[name].rpartition(":")[0]
    both = not host and socket.has_dualstack_ipv6()
    try:
        if not port.isdecimal() or int(port) > 65_535:
            raise ValueError("write PORT (0-65535), HOST:PORT, [IPV6]:PORT, or off alone")
        found = socket.getaddrinfo(host or ("::" if both else "0.0.0.0"), int(port))
        family, *_, place = min(found)  # IPv4 if the host has both
        return socket.create_server(place, family=family, backlog=4_096, dualstack_ipv6=both)
    except (OSError, ValueError) as problem:
        words = getattr(problem, "strerror", None) or problem
        raise StartError(f"--{name}: cannot listen on {address!a}: {words}") from None


def notify_ready() -> None:
    """Tell the service manager, if there is one, that the service is ready: see sd_notify(3)."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"READY=1", "\0" + path[1:] if path.startswith("@") else path)


def find_identity(run_as: str) -> tuple[int, int]:
    """The uid and the gid of USER[:GROUP], each a name or a number."""
    user, _, group = run_as.partition(":")
    try:
        uid, gid = (int(user), int(user)) if user.isdigit() else pwd.getpwnam(user)[2:4]
        if group:
            gid = int(group) if group.isdigit() else grp.getgrnam(group).gr_gid
        return uid, gid
    except (KeyError, ValueError):
        raise StartError(f"--run-as: no such user or group: {run_as!a}") from None


def drop_privileges(uid: int, gid: int) -> None:
    """Change to this user and group for good."""
    "host".encode("idna")  # import now what these need: it may be unreadable later
    time.strptime("0", "%S")
    try:
        os.setgroups([])  # first, since only root can change them
        os.setgid(gid)
        os.setuid(uid)
    except (OSError, OverflowError) as problem:
        raise StartError(f"--run-as: {problem}; was it started by root?") from None


def refuse_shared(folder: pathlib.Path, uid: int) -> None:
    """Raise StartError if anyone but root and `uid` can write to `folder` or replace it.

    The group whose gid is `uid` counts as the user's own: many systems give each user one.
    """
    for part in (folder, *folder.parents):
        with contextlib.suppress(FileNotFoundError, PermissionError):
            found = part.stat()
            writers = stat.S_IWOTH if found.st_gid == uid else stat.S_IWOTH | stat.S_IWGRP
            if part != folder and found.st_mode & stat.S_ISVTX:
                writers = 0  # nobody can move another user's directory out of this one
            if found.st_uid not in (0, uid) or found.st_mode & writers:
                owner = f"uid {found.st_uid} or others can write here"
                raise StartError(
                    f"{part}: {owner}: chmod it, chown it to uid {uid}, or see --state"
                )
        if str(part) == os.path.realpath(os.path.expanduser("~")):
            return  # what is above a home is not its user's to change


def restore_messages(store: StatusStore, path: pathlib.Path, is_default: bool) -> None:
    """Connect the store to its state file; a default one that cannot be made is not an error."""
    try:
        store.restore(StateFile(path))
        log.info("state: %s, %d messages", path, len(store.now.messages))
    except NotKept as problem:
        if not is_default or os.path.lexists(path):
            raise
        store.lost_at_restart = True
        store.problems["state file"] = str(problem)
        log.warning("messages will be lost when fingerd ends: %s", problem)


# ================================================================================================
# 6. command line: options, privileges, the start and the end
# ================================================================================================

EPILOG = """
ADDRESS is PORT, HOST:PORT, [IPV6]:PORT or off; port 0 is any free port. Without a host, the finger
and web servers listen on all addresses of this machine, IPv4 and IPv6, the setter on 127.0.0.1.
SIGHUP reloads the users file at once; SIGTERM and SIGINT stop the service. The exit status is 0
for success, 1 if the service cannot start or --check finds problems, 2 for wrong options.
"""


def irc_server(text: str) -> tuple[str, int]:
    """The host and port of HOST, HOST:PORT or [IPV6]:PORT; without a port, 0."""
    parts = urllib.parse.urlsplit(f"//{text}")
    return parts.hostname or text, parts.port or 0


def add_irc_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the bot."""
    add = parser.add_argument_group("IRC").add_argument
    text = "reply on this IRC server (default: on none)"
    add("--irc", dest="irc_server", metavar="HOST[:PORT]", type=irc_server, help=text)
    text = "no TLS; port 6667 instead of 6697"
    add("--irc-plaintext", dest="irc_tls", action="store_false", help=text)
    text = "trust only the server certificate with this digest"
    add("--irc-fingerprint", metavar="SHA256", default="", help=text)
    add("--irc-nick", metavar="NICK", default="fingerbot", help="(default: fingerbot)")
    text = "join this channel and announce changes there; repeatable"
    name = "'#NAME [KEY]'"
    add("--irc-channel", dest="irc_channels", metavar=name, action="append", default=[], help=text)
    add("--irc-account", metavar="NAME", default="", help="log in with SASL")
    text = "PEM file with a certificate and key to log in with, instead of a password"
    add("--irc-certificate", metavar="FILE", default="", help=text)
    text = "password of the account or server (default: $FINGERD_IRC_PASSWORD)"
    add("--irc-password-file", metavar="FILE", help=text)


def irc_options(options: argparse.Namespace) -> IrcOptions:
    """The settings of the bot; StartError for a wrong option, OSError for an unreadable file."""
    options.irc_fingerprint = options.irc_fingerprint.replace(":", "").lower()
    options.irc_password = os.environ.get("FINGERD_IRC_PASSWORD", "")
    if options.irc_password_file:
        text = pathlib.Path(options.irc_password_file).read_text("utf-8", "replace")
        options.irc_password = text.partition("\n")[0]
    irc = IrcOptions(*(getattr(options, f"irc_{name}") for name in IrcOptions._fields))
    if not all(re.fullmatch("[#&+!][^ ,]+( [^ ,]+)?", channel) for channel in irc.channels):
        raise StartError("--irc-channel: not '#NAME' or '#NAME KEY'")
    is_here = re.fullmatch(r"localhost|127(\.\d+){3}|::1", irc.server[0])
    has_secret = (irc.account or irc.password) and not is_here
    if not irc.tls and (has_secret or irc.certificate or irc.fingerprint):
        words = "needs TLS; so does a log-in, unless HOST is localhost"
        raise StartError(f"--irc-plaintext: a certificate or a fingerprint {words}")
    return irc


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    """The options; exits with status 2 if they are wrong."""
    description = "A status line for each user, by finger, web, XML-RPC and IRC, from one file."
    parser = argparse.ArgumentParser(description=description, epilog=EPILOG)
    add = parser.add_argument
    add("users", metavar="USERS", help="the users file, one `user: status` a line, or its URL")
    add("--check", action="store_true", help="list the problems of the users file, and exit")
    add("--version", action="version", version=f"fingerd {__version__}")
    add("-v", "--verbose", action="store_true", help="log every query")
    add = parser.add_argument_group("where to listen").add_argument
    for name, default in DEFAULT_ADDRESSES.items():
        text = f"address of the {name} server (default: {default}); repeatable"
        add(f"--{name}", metavar="ADDRESS", action="append", default=[], help=text)
    add = parser.add_argument_group("what to answer").add_argument
    add("--private", action="store_true", help="refuse listings; answer only for named users")
    text = "a name of this machine, as in `finger user@NAME`; repeatable"
    add("--hostname", metavar="NAME", action="append", default=[], help=text)
    add("--public-url", metavar="URL", default="", help="the web server's public URL")
    add("--plans", metavar="DIR", help="show plans: DIR/USER, or for `home` each person's ~/.plan")
    add = parser.add_argument_group("how to run").add_argument
    text = "seconds between checks of the users file (default: 30)"
    add("--interval", metavar="S", type=float, default=30.0, help=text)
    add("--state", metavar="FILE", help="file for messages, or off (default: in /var/lib or ~)")
    add("--run-as", metavar="USER[:GROUP]", help="drop root privileges to this user (default: 1:1)")
    add_irc_options(parser)
    options = parser.parse_args(arguments)
    if not 0 < options.interval <= threading.TIMEOUT_MAX:
        parser.error("argument --interval: not above 0, or too long")
    if not re.fullmatch(rf"|https?://{HOST}(/[!$-;=@-~]*)?", options.public_url):
        parser.error(f"argument --public-url: {options.public_url!a} is not an http(s) address")
    return options


def start_log(verbose: bool) -> logging.Handler:
    """Log to stderr until the handler is closed; nowhere if stderr is closed."""
    handler = LogWriter(sys.stderr.fileno()) if sys.stderr else logging.NullHandler()
    plain = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(JournalFormatter() if is_journal() else plain)
    if not verbose:
        handler.addFilter(FloodFilter())
    log.addHandler(handler)
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    return handler


def find_source(options: argparse.Namespace, state: pathlib.Path | None) -> FileSource | UrlSource:
    """The source of the users file; the copy of one from a server is beside the `state` file."""
    if URL.match(options.users):
        return UrlSource(options.users, state and state.with_name(state.name + ".users"))
    return FileSource(pathlib.Path(options.users))


def check(source: FileSource | UrlSource) -> int:
    """Print the problems of the users file, and warnings; return the exit status."""
    users = source.read({}, at_once=True) or UsersFile({}, [])
    ordered = sorted(users.texts, key=str.casefold)
    same = [list(names) for _, names in itertools.groupby(ordered, str.casefold)]
    alike = [f" {' and '.join(names)} differ only in case" for names in same if len(names) > 1]
    warnings = [f"{warning} (a warning)" for warning in users.repeated + alike]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    for line in users.problems + warnings:
        print(f"{source.name}:{line}")
    if not users.problems:
        found = f"{len(warnings)} warnings" if warnings else "no problems"
        print(f"{len(users.texts)} users, {found}")
    return 1 if users.problems else 0


def bind(options: argparse.Namespace) -> list[tuple[str, socket.socket]]:
    """The listeners and their servers' names: from systemd (sd_listen_fds(3)), or new ones."""
    is_ours = os.environ.get("LISTEN_PID") == str(os.getpid())
    names = os.environ.get("LISTEN_FDNAMES", "").split(":") if is_ours else []
    for name in names:
        if name not in DEFAULT_ADDRESSES or getattr(options, name) == ["off"]:
            raise StartError(f"LISTEN_FDNAMES: {name!a} is no server, or off: mask its unit")
    listeners = [(name, socket.socket(fileno=number)) for number, name in enumerate(names, 3)]
    for name, default in DEFAULT_ADDRESSES.items():
        addresses = getattr(options, name) or [default]
        if name not in names and addresses != ["off"]:
            listeners += [(name, listen(name, address)) for address in addresses]
    for name, listener in listeners:
        host, port = listener.getsockname()[:2]
        log.info("%s listening on %s:%d", name, f"[{host}]" if ":" in host else host, port)
        if name == "setter" and not re.match(r"127\.|::1$", host):
            log.warning("anybody who can reach %s can set anybody's message", host)
    return listeners


def state_path(options: argparse.Namespace, owner: tuple[int, int] | None) -> pathlib.Path | None:
    """The state file's path, None for no file; StartError if others can write to its directory.

    The default directory is made, for `owner`, if it is missing. Root creates nothing inside it.
    """
    if options.state == "off":
        return None
    users = options.users if URL.match(options.users) else os.path.abspath(options.users)
    name = re.sub(r"[][]", "", users.strip("/").replace("/", "-")) + ".db"
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    default = os.environ.get("STATE_DIRECTORY") or f"{'/var/lib' if owner else home}/fingerd"
    path = pathlib.Path(options.state or f"{default}/{name}")
    folder = pathlib.Path(os.path.realpath(path.parent))
    is_new = not (options.state or os.path.exists(folder))
    refuse_shared(folder, owner[0] if owner and not is_new else os.geteuid())
    if is_new:
        with contextlib.suppress(OSError):  # a failure shows when the file is opened
            folder.mkdir(0o700, parents=True)
            if owner:
                os.chown(folder, *owner, follow_symlinks=False)
    return folder / path.name


def make_policy(options: argparse.Namespace) -> Policy:
    """The part of the options that decides answers."""
    own, url = socket.gethostname(), options.public_url.rstrip("/")
    public = urllib.parse.urlsplit(url).hostname or own
    names = [*options.hostname, public, own, own.partition(".")[0], "localhost"]
    return Policy(
        private=options.private,
        hostnames=frozenset(name.lower().rstrip(".") for name in names),
        finger_host=names[0],
        shows_command=not options.finger,
        public_url=url + "/",
        feed_root=url + "/" if url else Policy().feed_root,
    )


def build(options: argparse.Namespace) -> tuple[StatusStore, Reloader, list[Server], list[IrcBot]]:
    """Make everything, ready to be started; raise StartError, NotKept or OSError on failure.

    Root binds the ports and makes the state directory. Then privileges are dropped, so that the
    users file is read with the same rights as later. The state file is opened last, so that a
    failed start leaves no new one behind.
    """
    run_as = options.run_as or ("1:1" if os.geteuid() == 0 else "")
    identity = find_identity(run_as) if run_as else None
    listeners = bind(options)
    path, store = state_path(options, identity), StatusStore()
    bots = [IrcBot(irc_options(options), store)] if options.irc_server else []
    source = find_source(options, path)
    reloader = Reloader(source, store, options.interval)
    if identity:
        drop_privileges(*identity)
    reloader.load(at_once=True)
    plans = Plans(options.plans, store) if options.plans else None
    if plans and options.plans != "home" and not os.access(f"{options.plans}/.", os.X_OK):
        raise StartError(f"--plans: {options.plans}: not a directory that can be searched")
    refresh = reloader.look if isinstance(source, FileSource) else bool  # a server may be slow
    site = Site(store, make_policy(options), plans, refresh)
    kinds = {kind.name: kind for kind in (FingerServer, SetterServer, WebServer)}
    servers: list[Server] = [kinds[name](listener, site) for name, listener in listeners]
    if path:
        restore_messages(store, path, is_default=not options.state)
    return store, reloader, servers, bots


def limit_connections(servers: list[Server]) -> None:
    """Raise the limit of open descriptors, and let the servers share them."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE_DESCRIPTORS
    for server in servers:
        server.ceiling = max(1, min(CONNECTIONS, descriptors // len(servers)))
    if servers and servers[0].ceiling < CONNECTIONS:
        log.info("the open files allow %d connections for each server", servers[0].ceiling)


def run(options: argparse.Namespace) -> None:
    """Run the service until SIGTERM or SIGINT."""
    store, reloader, servers, bots = build(options)
    limit_connections(servers)
    loops = [threading.Thread(target=each.run, name=each.name, daemon=True) for each in servers]
    expirer = threading.Thread(target=expire_messages, args=(store, reloader.finished), daemon=True)

    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # threads that are started later inherit it
    # With a busy thread, a loop drops from 7,700 answers/s to 2,100; with the default 5 ms, to 69.
    sys.setswitchinterval(1e-4)
    for thread in (*loops, *bots, reloader, expirer):
        thread.start()
    notify_ready()
    log.info("ready")
    while signal.sigwait(SIGNALS) == signal.SIGHUP:
        reloader.reload()

    reloader.cancel()
    for bot in bots:
        bot.stopping.set()
    for server in servers:
        server.shutdown()
    deadline = time.monotonic() + STOP_SECONDS + 2 * TURNS_SECONDS  # the loops end a turn later
    for thread in (*loops, *bots):
        thread.join(max(0.0, deadline - time.monotonic()))
    log.info("stopped")


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line asks for, and return the exit status."""
    options = parse_args(arguments)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # kept until the service is ready
    try:
        if options.check:
            return check(find_source(options, None))
        with contextlib.closing(start_log(options.verbose)):
            run(options)
    except (StartError, NotKept, OSError) as problem:
        print(f"{'<3>' if is_journal() else ''}fingerd: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
