# SPDX-License-Identifier: MIT
# make [build]       build the daemon
# make run           build, then serve MOUNTPOINT in the foreground (as root)
# make test          build, then run those tests that need no root, no disk and no mount
# make check         build, then run the tests (as root); BUSY=4 beside that many busy loops
# make check-long    the rest: twins, long tests, sanitizers (as root)
# make check-vm      the package, in virtual machines of Debian releases (as root)
# make check-fresh   "make run" on nothing but a minimal Debian (as root); FRESH="bookworm trixie"
# make check-types   type-check the sources and the tests
# make lint          what a linter finds, and whether the sources are formatted (npm run format)
# make soak          everything at once for MINUTES=30; 200 kills, 10,000 disks
# make fuzz          garbage for every input; INPUTS=10000000, SEED, SURFACE
# make bench         build, then run the benchmarks
# make bench-against the same, against an earlier commit: OLD=COMMIT
# make bench-faults  the same, of what faults cost callers that have nothing to do with them
# make bench-forgetting  the same, of making the kernel forget one of many names
# make install       honours PREFIX, SBINDIR, UDEVDIR, UNITDIR and DESTDIR, as does uninstall
# make deb           a Debian package in build/
# make npm-package   the same for npm, as a library
# make api-docs      the library's documentation in build/api
# make clean         remove what was built

MOUNTPOINT = /dev/disk/by-diskseq
PREFIX = /usr/local
BINDIR = $(PREFIX)/bin
LIBDIR = $(PREFIX)/lib/diskseqfs
# where mount(8) looks for its helpers, whatever the prefix
SBINDIR = /sbin
# where udev looks for its rules and what they run, whatever the prefix
UDEVDIR = /usr/lib/udev
UNITDIR = $(PREFIX)/lib/systemd/system
UNITS = diskseqfs.service diskseqfs-storage.socket diskseqfs-storage@.service
# The only directory where systemd-sleep looks for what to run.
SLEEPDIR = /usr/lib/systemd/system-sleep
SHAREDIR = $(PREFIX)/share
MANDIR = $(SHAREDIR)/man

# A Node.js in .node is installed too, as the system then has no other to run with.
BUNDLED_NODE = $(wildcard .node/bin/node)

# .node is there if scripts/setup found no suitable node; "su" leaves root
# without the sbin directories.
export PATH := $(CURDIR)/.node/bin:$(CURDIR)/node_modules/.bin:$(PATH):/usr/sbin:/sbin

ADDON = native/build/Release/diskseqfs_native.node
# Stamp of npm ci; lists the packages that become part of the daemon.
DEPS = node_modules/.production
# The library of --transport fuse-native; only the tests and the benchmark come with it.
FUSE_NATIVE = node_modules/fuse-native/build/Release/fuse.node

# Run by udev; see udev/61-diskseqfs.rules.
LINK = udev/diskseqfs-link
# For scripts; see man/diskseq.1.
DISKSEQ = native/diskseq/diskseq
# What the benchmark compares the daemon with.
PEER = build/peers/server
# Stands in for the daemon while there is none.
GUARD = native/diskseqfs-guard

build: $(ADDON) $(LINK) $(DISKSEQ) $(GUARD) dist/cli.js

$(GUARD): $(wildcard native/guard/*.c native/guard/*.h) native/shared/state.h
	$(CC) -O2 -Wall -Wextra $(CPPFLAGS) $(CFLAGS) $(LDFLAGS) -o $@ $(filter %.c,$^)

# Static if there is a static libc: they are started for each event of a device, or for each disk, and
# the dynamic linker would take most of that time.
$(LINK) $(DISKSEQ): %: %.c
	$(CC) -O2 -Wall -Wextra $(CPPFLAGS) $(CFLAGS) $(LDFLAGS) -static-pie -fPIE -o $@ $< 2>/dev/null || \
		$(CC) -O2 -Wall -Wextra $(CPPFLAGS) $(CFLAGS) $(LDFLAGS) -o $@ $<

setup:
	@scripts/setup $(if $(filter check check-long,$(MAKECMDGOALS)),check)

# --include=dev: with NODE_ENV=production npm would leave out the compiler.
# --ignore-scripts: fuse-native's compiles it with headers that node-gyp downloads;
# no other package needs its own.
$(DEPS): package.json package-lock.json | setup
	@echo 'setup: installing the npm packages'
	@npm ci --include=dev --ignore-scripts --no-audit --no-fund --loglevel=error
	@npm ls --all --omit=dev --parseable >$@
	@sed -i 's|^$(CURDIR)/*||' $@

# --nodedir: without it node-gyp downloads headers.  scripts/setup has made sure
# that they are beside node.
NODE_GYP = node-gyp --loglevel=warn --jobs=max --nodedir="$$(node -p 'path.resolve(process.execPath, "../..")')"

$(ADDON): $(wildcard native/addon/* native/shared/*) native/binding.gyp | $(DEPS)
	@echo 'setup: compiling the addon'
	@$(NODE_GYP) -C native rebuild

# Not order-only: npm ci removes it.
$(FUSE_NATIVE): $(DEPS)
	@echo 'setup: compiling fuse-native'
	@$(NODE_GYP) -C node_modules/fuse-native rebuild

# The modules one by one, so that the tests can replace some. The directories are listed so that
# make notices files that are gone; the rm removes what was made of them.
build/src/cli.js: tsconfig.json $(shell find src -name '*.ts' -o -name '*.varlink' -o -type d) | $(DEPS)
	@echo 'setup: compiling the program'
	@rm -rf build/src
	@tsc -p tsconfig.json
	@cp src/broker/*.varlink build/src/broker
	@ln -sfn ../native build/native

# What runs: one file each for the program and the library, as finding and reading a module costs Node.js a
# millisecond, and no ES module, as starting its loader for them costs ten. Their types are beside them.
BUNDLE = esbuild --bundle --minify-syntax --platform=node --target=node20 --format=cjs \
	--external:fuse-native --log-level=warning --define:import.meta.url=ownUrl
OWN_URL = "use strict"; const ownUrl = require("node:url").pathToFileURL(__filename).href
# Of Node.js, SIGUSR1 opens a debugger, to which any local user may connect: nothing of the kind from here on.
NO_DEBUGGER = process.on("SIGUSR1", () => {})

dist/cli.js: build/src/cli.js
	@rm -rf dist
	@$(BUNDLE) $< --outfile=$@ --banner:js='$(OWN_URL); $(NO_DEBUGGER)'
	@$(BUNDLE) build/src/index.js --outfile=dist/index.js --banner:js='$(OWN_URL)'
	@cd build/src && find index.d.ts native.d.ts broker devices disks fuse/transport.d.ts util -name '*.d.ts' -exec install -D -m 644 '{}' '../../dist/types/{}' ';'
	@echo '{ "type": "commonjs" }' >dist/package.json
	@cp src/broker/*.varlink dist
	@for package in $$(cat $(DEPS)); do \
		printf '%s\n\n' "$${package#node_modules/}"; cat "$$package"/[Ll][Ii][Cc][Ee][Nn][CcSs][Ee]*; echo; \
	done >dist/LICENSES
	@chmod +x $@

# For npm: all that it needs is in it, so that it is installed without a compiler and without a download.
NPM_PACKAGE = build/npm
npm-package: build
	@rm -rf $(NPM_PACKAGE)
	@mkdir -p $(NPM_PACKAGE)/prebuilds/$$(node -p 'process.platform + "-" + process.arch')
	@cp $(ADDON) $(NPM_PACKAGE)/prebuilds/*
	@cp -R dist README.md LICENSE $(NPM_PACKAGE)
	@node -p 'const { scripts, dependencies, devDependencies, ...rest } = require("./package.json"); JSON.stringify(rest, null, 2)' \
		>$(NPM_PACKAGE)/package.json
	@cd build && npm pack --silent ./npm

# Fails where something of the library has no documentation.
api-docs: $(DEPS)
	npm run --silent docs

run:
	@[ "$$(id -u)" -eq 0 ] || { echo 'make run: must be root to mount' >&2; exit 1; }
	@$(MAKE) --no-print-directory build
	@scripts/run "$(MOUNTPOINT)"

# With the modules that they import, which are those of the program once more.
TESTS = build/test/run.js
$(TESTS): test/tsconfig.json $(shell find test -mindepth 1 -name '*.ts' -o -mindepth 1 -type d) build/src/cli.js
	@echo 'setup: compiling the tests'
	@rm -rf build/test
	@tsc -p test

test: build $(TESTS)
	node $(TESTS) $(wildcard test/unit/*/*.test.ts)

check check-long: build $(TESTS) $(FUSE_NATIVE)
	@[ "$$(id -u)" -eq 0 ] || { echo 'make $@: must be root to mount and to make loop devices' >&2; exit 1; }
	@setpriv --reuid=65534 --regid=65534 --clear-groups node dist/cli.js --version >/dev/null 2>&1 || \
		{ echo 'make $@: some tests run the program as an unprivileged user;' \
			'move the project to where others may enter (not /root)' >&2; exit 1; }
	BUSY=$(BUSY) scripts/check $(if $(filter check,$@),short,long)

# One machine at a time: two of them are more than twice as slow on two processors.
# CASES=name,... runs only some of them; SHORT=1 fewer rounds, and some on one
# release only: see test/vm/case.ts.  forky has what only systemd 261 and later can show.
VM = bookworm trixie $(if $(SHORT),,forky)
check-vm: $(TESTS)
	@[ "$$(id -u)" -eq 0 ] || { echo 'make check-vm: must be root to build the machines' >&2; exit 1; }
	@scripts/setup vm
	@$(MAKE) --no-print-directory deb
	rm -f $(VM:%=build/vm/%.json)
	status=0; node $(TESTS) --jobs=1 --timeout=4000 $(VM:%=test/vm/%.ts) || status=$$?; \
		node test/vm/table.mjs; exit $$status

# Each takes two minutes or more.
FRESH = bookworm trixie
check-fresh: $(TESTS)
	@[ "$$(id -u)" -eq 0 ] || { echo 'make check-fresh: must be root to mount and to make loop devices' >&2; exit 1; }
	@scripts/setup fresh
	node $(TESTS) --jobs=1 --timeout=2000 $(FRESH:%=test/fresh/%.ts)

check-types: $(DEPS)
	tsc --noEmit -p tsconfig.json
	tsc --noEmit -p test

lint: $(DEPS)
	npm run --silent lint
	npm run --silent format:check
	npm run --silent docs -- --emit none
	@! git ls-files '*.ts' '*.mjs' '*.c' '*.cc' '*.h' | xargs grep -L 'SPDX-License-Identifier: ' | grep . || \
		{ echo 'make lint: these have no SPDX-License-Identifier' >&2; exit 1; }

# The short forms are part of "make check" and "make check-long".
MINUTES = 30
soak: build $(TESTS)
	KILLS=200 STORM=10000 SOAK_MINUTES=$(MINUTES) node $(TESTS) --timeout=$$(($(MINUTES) * 60 + 900)) \
		test/load/kills.test.ts test/load/storm.test.ts test/load/soak.test.ts

# The short form is test/fuzz/fuzz.test.ts and test/fuzz/asan.test.ts.
INPUTS = 10000000
fuzz: build $(TESTS)
	node --expose-gc build/test/fuzz/run.js $(INPUTS) "$(or $(SEED),$$(date +%s))" $(if $(SURFACE),"$(SURFACE)")

bench: build $(FUSE_NATIVE)
	@[ "$$(id -u)" -eq 0 ] || { echo 'make bench: must be root to mount and to make loop devices' >&2; exit 1; }
	@scripts/setup bench
	@$(MAKE) --no-print-directory $(PEER)
	@[ -n "$(QUICK)" ] || { scripts/setup vm && $(MAKE) --no-print-directory deb >/dev/null; }
	npm run $@

# libfuse is linked into it, as it runs in the virtual machine, too.
$(PEER): bench/peers/server.c
	@mkdir -p $(@D)
	$(CC) -O2 -Wall -Wextra -pthread $(CPPFLAGS) $(CFLAGS) $(LDFLAGS) -o $@ $< \
		$$(pkg-config --cflags fuse3) -l:libfuse3.a

bench-faults: build
	npm run $@

bench-forgetting: build
	npm run $@

bench-against: build
	@[ -n "$(OLD)" ] || { echo 'make bench-against: say against what: OLD=COMMIT' >&2; exit 1; }
	OLD="$(OLD)" npm run $@

# Not dependent on build: under sudo, PATH may have another node or none.
install:
	@[ -e dist/cli.js ] && [ -e $(ADDON) ] && [ -e $(LINK) ] && [ -e $(DISKSEQ) ] && [ -e $(GUARD) ] || $(MAKE) --no-print-directory build
	rm -rf "$(DESTDIR)$(LIBDIR)"
	install -d "$(DESTDIR)$(LIBDIR)" "$(DESTDIR)$(BINDIR)" "$(DESTDIR)$(SBINDIR)"
	cp -R --parents package.json dist $(ADDON) "$(DESTDIR)$(LIBDIR)"
	cp $(GUARD) "$(DESTDIR)$(LIBDIR)"
	sed 's|@UDEVDIR@|$(UDEVDIR)|g' systemd/diskseqfs-stock >"$(DESTDIR)$(LIBDIR)/diskseqfs-stock"
	chmod +x "$(DESTDIR)$(LIBDIR)/diskseqfs-stock"
	install -D -m 755 systemd/diskseqfs-sleep "$(DESTDIR)$(SLEEPDIR)/diskseqfs"
	$(if $(BUNDLED_NODE),install -D "$(BUNDLED_NODE)" "$(DESTDIR)$(LIBDIR)/bin/node")
	chmod -R u=rwX,go=rX "$(DESTDIR)$(LIBDIR)"
	printf '%s\n' '#!/bin/sh' \
		'lib=$$(dirname "$$(readlink -f "$$0")")/../lib/diskseqfs' \
		'PATH=$$lib/bin:$$PATH' \
		'command -v node >/dev/null ||' \
		'	{ echo "diskseqfs: there is no node in PATH; install Node.js 20 or later" >&2; exit 1; }' \
		'exec node "$$lib/dist/cli.js" "$$@"' \
		>"$(DESTDIR)$(BINDIR)/diskseqfs"
	sed 's|@BINDIR@|$(BINDIR)|' scripts/mount.fuse.diskseqfs \
		>"$(DESTDIR)$(SBINDIR)/mount.fuse.diskseqfs"
	chmod 755 "$(DESTDIR)$(BINDIR)/diskseqfs" "$(DESTDIR)$(SBINDIR)/mount.fuse.diskseqfs"
	install -d "$(DESTDIR)$(UDEVDIR)/rules.d" "$(DESTDIR)$(UNITDIR)"
	install -m 755 $(LINK) "$(DESTDIR)$(UDEVDIR)"
	install -m 755 $(DISKSEQ) "$(DESTDIR)$(BINDIR)"
	install -m 644 udev/*.rules "$(DESTDIR)$(UDEVDIR)/rules.d"
	install -d "$(DESTDIR)$(MANDIR)/man1" "$(DESTDIR)$(MANDIR)/man5" "$(DESTDIR)$(MANDIR)/man8"
	install -m 644 man/*.1 "$(DESTDIR)$(MANDIR)/man1"
	install -m 644 man/*.5 "$(DESTDIR)$(MANDIR)/man5"
	install -m 644 man/*.8 "$(DESTDIR)$(MANDIR)/man8"
	install -D -m 644 scripts/completion/diskseqfs.bash "$(DESTDIR)$(SHAREDIR)/bash-completion/completions/diskseqfs"
	install -D -m 644 scripts/completion/_diskseqfs "$(DESTDIR)$(SHAREDIR)/zsh/site-functions/_diskseqfs"
	install -D -m 644 scripts/completion/diskseqfs.fish "$(DESTDIR)$(SHAREDIR)/fish/vendor_completions.d/diskseqfs.fish"
	for unit in $(UNITS); do \
		sed 's|@BINDIR@|$(BINDIR)|g; s|@LIBDIR@|$(LIBDIR)|g' "systemd/$$unit" >"$(DESTDIR)$(UNITDIR)/$$unit" || exit; \
	done

# A running service is stopped first: it unmounts its tree, and gives the names back.
uninstall:
	@[ -n "$(DESTDIR)" ] || [ ! -d /run/systemd/system ] || \
		[ "$$(systemctl show -P FragmentPath diskseqfs.service)" != "$(UNITDIR)/diskseqfs.service" ] || \
		systemctl disable --quiet --now diskseqfs-storage.socket diskseqfs.service
	@[ -n "$(DESTDIR)" ] || [ ! -x "$(UDEVDIR)/diskseqfs-link" ] || "$(UDEVDIR)/diskseqfs-link" stock
	rm -rf "$(DESTDIR)$(LIBDIR)"
	rm -f "$(DESTDIR)$(BINDIR)/diskseqfs" "$(DESTDIR)$(BINDIR)/diskseq" "$(DESTDIR)$(SBINDIR)/mount.fuse.diskseqfs" \
		"$(DESTDIR)$(UDEVDIR)/diskseqfs-link" \
		$(patsubst %,"$(DESTDIR)$(UNITDIR)/%",$(UNITS)) "$(DESTDIR)$(SLEEPDIR)/diskseqfs" \
		"$(DESTDIR)$(SHAREDIR)/bash-completion/completions/diskseqfs" "$(DESTDIR)$(SHAREDIR)/zsh/site-functions/_diskseqfs" \
		"$(DESTDIR)$(SHAREDIR)/fish/vendor_completions.d/diskseqfs.fish" \
		"$(DESTDIR)$(MANDIR)/man1/diskseq.1" "$(DESTDIR)$(MANDIR)/man5/diskseqfs.5" $(patsubst man/%,"$(DESTDIR)$(MANDIR)/man8/%",$(wildcard man/*.8)) \
		$(patsubst udev/%,"$(DESTDIR)$(UDEVDIR)/rules.d/%",$(wildcard udev/*.rules))
	@[ -n "$(DESTDIR)" ] || [ ! -d /run/systemd/system ] || systemctl daemon-reload
	@[ -n "$(DESTDIR)" ] || [ ! -d /run/udev ] || { udevadm control --reload; udevadm trigger --subsystem-match=block; }

# Rules-Requires-Root: no, so that dpkg-buildpackage's fakeroot is not needed.
deb: build
	@scripts/setup deb
	DEB_RULES_REQUIRES_ROOT=no debian/rules binary

clean:
	rm -rf dist native/build $(LINK) $(DISKSEQ) $(GUARD) build/src build/test build/bench build/peers build/asan build/fresh build/diskseqfs_*.deb build/npm build/diskseqfs-*.tgz

.DELETE_ON_ERROR:
.PHONY: build npm-package api-docs setup run test check check-long check-vm check-fresh check-types lint soak fuzz bench bench-against bench-faults bench-forgetting install uninstall deb clean
