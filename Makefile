# make run | test | check | bench | install | clean

PYTHON  ?= python3
PREFIX  ?= /usr/local
DESTDIR ?=
VENV     = .venv
UNITS    = $(DESTDIR)$(PREFIX)/lib/systemd/system

.PHONY: run test check bench install clean

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

install:  ## the file, and units for systemd: enable fingerd.service, or fingerd.socket for port 79
	install -D -m 755 fingerd.py $(DESTDIR)$(PREFIX)/bin/fingerd
	install -d $(UNITS)
	printf '%s\n' "$$SERVICE" >$(UNITS)/fingerd.service
	printf '%s\n' "$$SOCKETS" >$(UNITS)/fingerd.socket

clean:
	rm -rf __pycache__ .mypy_cache .ruff_cache $(VENV)

define SERVICE
[Unit]
Description=Everybody's status line, by finger, web, XML-RPC and IRC
Documentation=https://www.rfc-editor.org/rfc/rfc1288
After=network.target

[Service]
Type=notify
ExecStart=$(PREFIX)/bin/fingerd /etc/users
ExecReload=/bin/kill -HUP $$MAINPID
Restart=on-failure
DynamicUser=yes
StateDirectory=fingerd
AmbientCapabilities=CAP_NET_BIND_SERVICE
CapabilityBoundingSet=CAP_NET_BIND_SERVICE
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
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
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
endef
export SERVICE

# systemd holds the ports, so that no client is refused while the service is started again.
define SOCKETS
[Unit]
Description=The ports of fingerd

[Socket]
ListenStream=79
FileDescriptorName=finger
Service=fingerd.service

[Install]
WantedBy=sockets.target
endef
export SOCKETS
