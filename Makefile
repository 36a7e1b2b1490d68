# make run | test | check | bench | install | uninstall | clean

PYTHON  ?= python3
PREFIX  ?= /usr/local
DESTDIR ?=
VENV     = .venv
USERS    = /etc/users
UNITS    = $(DESTDIR)$(PREFIX)/lib/systemd/system
SOCKETS  = fingerd.socket fingerd-setter.socket fingerd-web.socket
LIVE     = [ -z "$(DESTDIR)" ] && [ -d /run/systemd/system ]

.PHONY: run test check bench install uninstall clean

run:  ## the example on unprivileged loopback ports, until Ctrl-C
	$(PYTHON) fingerd.py --finger 127.0.0.1:7979 --setter 127.0.0.1:1079 \
	    --web 127.0.0.1:8000 --state off users.example

test:  ## all tests; FUZZ=100000 and SOAK=100000 for more of some
	$(PYTHON) test_fingerd.py

check:  ## lint, format and types; the tools come into a throw-away venv where they are missing
	@if command -v ruff >/dev/null && command -v mypy >/dev/null; then :; else \
	    $(PYTHON) -m venv $(VENV) && $(VENV)/bin/pip install -q ruff mypy; fi
	@PATH="$$PATH:$(VENV)/bin"; set -ex; \
	    ruff check .; ruff format --check .; mypy --strict fingerd.py

bench:  ## answers a second and CPU per answer, beside the smallest loop that could do the job
	$(PYTHON) test_fingerd.py bench

install:  ## the program, a users file if there is none, and units for systemd
	install -D -m 755 fingerd.py $(DESTDIR)$(PREFIX)/bin/fingerd
	[ -e $(DESTDIR)$(USERS) ] || { install -D -m 644 /dev/null $(DESTDIR)$(USERS); \
	    sed 's/^[^#]/# &/' users.example >$(DESTDIR)$(USERS); }
	install -d $(UNITS)
	printf '%s\n' "$$SERVICE" >$(UNITS)/fingerd.service
	printf "$$SOCKET" finger finger 79 >$(UNITS)/fingerd.socket
	printf "$$SOCKET" setter setter 127.0.0.1:1079 >$(UNITS)/fingerd-setter.socket
	printf "$$SOCKET" web web 8000 >$(UNITS)/fingerd-web.socket
	! { $(LIVE); } || systemctl daemon-reload

uninstall:  ## stop it, and remove all of this but the users file and the messages
	! { $(LIVE); } || systemctl disable --now fingerd.service $(SOCKETS) || true
	rm -f $(DESTDIR)$(PREFIX)/bin/fingerd $(addprefix $(UNITS)/,fingerd.service $(SOCKETS))
	! { $(LIVE); } || systemctl daemon-reload
	@echo "kept: $(USERS), /var/lib/private/fingerd"

clean:
	rm -rf __pycache__ .mypy_cache .ruff_cache $(VENV)

define SERVICE
[Unit]
Description=Status lines by finger, web, XML-RPC and IRC
Documentation=https://www.rfc-editor.org/rfc/rfc1288
After=network.target
Requires=fingerd.socket
StartLimitIntervalSec=0

[Service]
Type=notify
ExecStart=$(PREFIX)/bin/fingerd $(USERS)
ExecReload=/bin/kill -HUP $$MAINPID
Sockets=$(SOCKETS)
Restart=on-failure
RestartSec=3
DynamicUser=yes
StateDirectory=fingerd
CapabilityBoundingSet=
LockPersonality=yes
MemoryDenyWriteExecute=yes
NoNewPrivileges=yes
PrivateDevices=yes
PrivateTmp=yes
ProcSubset=pid
ProtectClock=yes
ProtectControlGroups=yes
ProtectHome=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
ProtectSystem=strict
RemoveIPC=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_NETLINK AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallErrorNumber=EPERM
LimitNOFILE=65536
UMask=0077

[Install]
WantedBy=multi-user.target
Also=$(SOCKETS)
endef
export SERVICE

# systemd holds the ports, so that no client is refused while the service restarts.
define SOCKET
[Unit]
Description=The port of fingerd's %s server

[Socket]
FileDescriptorName=%s
ListenStream=%s
Backlog=4096
Service=fingerd.service

[Install]
WantedBy=sockets.target

endef
export SOCKET
