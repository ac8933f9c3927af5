# make [build]       build the daemon
# make run           build, then serve MOUNTPOINT in the foreground (as root)
# make check         build, then run the tests (as root)
# make check-types   type-check the sources and the tests
# make bench         build, then run the benchmarks
# make install       honours PREFIX, SBINDIR and DESTDIR, as does uninstall
# make clean         remove what was built

MOUNTPOINT = /dev/disk/by-diskseq
PREFIX = /usr/local
BINDIR = $(PREFIX)/bin
LIBDIR = $(PREFIX)/lib/diskseqfs
# where mount(8) looks for its helpers, whatever the prefix
SBINDIR = /sbin

# .node is there if scripts/setup found no suitable node; "su" leaves root
# without the sbin directories.
export PATH := $(CURDIR)/.node/bin:$(CURDIR)/node_modules/.bin:$(PATH):/usr/sbin:/sbin

ADDON = native/build/Release/diskseqfs_native.node
# Stamp of npm ci; lists the packages to install with the daemon.
DEPS = node_modules/.production

build: $(ADDON) dist/cli.js

setup:
	@scripts/setup $(filter check,$(MAKECMDGOALS))

# --include=dev: with NODE_ENV=production npm would leave out the compiler.
$(DEPS): package.json package-lock.json | setup
	npm ci --include=dev --no-audit --no-fund
	npm ls --all --omit=dev --parseable >$@
	sed -i 's|^$(CURDIR)/*||' $@

# --nodedir: without it node-gyp downloads headers.  scripts/setup has made sure
# that they are beside node.
$(ADDON): $(wildcard native/*.cc native/*.h native/*.gyp) | $(DEPS)
	node-gyp -C native --loglevel=warn \
		--nodedir="$$(node -p 'path.resolve(process.execPath, "../..")')" rebuild

# The directories are there to notice files that are gone, the rm to forget them.
dist/cli.js: tsconfig.json $(shell find src -name '*.ts' -o -type d) | $(DEPS)
	rm -rf dist
	tsc -p tsconfig.json
	chmod +x $@

run:
	@[ "$$(id -u)" -eq 0 ] || { echo 'make run: must be root to mount' >&2; exit 1; }
	@$(MAKE) --no-print-directory build
	@scripts/run "$(MOUNTPOINT)"

check: build
	@[ "$$(id -u)" -eq 0 ] || { echo 'make check: must be root to mount and to make loop devices' >&2; exit 1; }
	@setpriv --reuid=65534 --regid=65534 --clear-groups node dist/cli.js --version >/dev/null 2>&1 || \
		{ echo 'make check: some tests run the program as an unprivileged user;' \
			'move the project to where others may enter (not /root)' >&2; exit 1; }
	tap

check-types: $(DEPS)
	tsc --noEmit -p test

bench: build
	npm run bench

# Not dependent on build: under sudo, PATH may have another node or none.
# A node in .node is installed too, as the system then has no other to run with.
install:
	@[ -e dist/cli.js ] && [ -e $(ADDON) ] || $(MAKE) --no-print-directory build
	rm -rf "$(DESTDIR)$(LIBDIR)"
	install -d "$(DESTDIR)$(LIBDIR)" "$(DESTDIR)$(BINDIR)" "$(DESTDIR)$(SBINDIR)"
	cp -R --parents package.json dist $(ADDON) $$(cat $(DEPS)) "$(DESTDIR)$(LIBDIR)"
	if [ -e .node/bin/node ]; then install -D .node/bin/node "$(DESTDIR)$(LIBDIR)/bin/node"; fi
	chmod -R u=rwX,go=rX "$(DESTDIR)$(LIBDIR)"
	printf '%s\n' '#!/bin/sh' \
		'lib=$$(dirname "$$(readlink -f "$$0")")/../lib/diskseqfs' \
		'PATH=$$lib/bin:$$PATH exec node "$$lib/dist/cli.js" "$$@"' \
		>"$(DESTDIR)$(BINDIR)/diskseqfs"
	sed 's|@BINDIR@|$(BINDIR)|' scripts/mount.fuse.diskseqfs \
		>"$(DESTDIR)$(SBINDIR)/mount.fuse.diskseqfs"
	chmod 755 "$(DESTDIR)$(BINDIR)/diskseqfs" "$(DESTDIR)$(SBINDIR)/mount.fuse.diskseqfs"

uninstall:
	rm -rf "$(DESTDIR)$(LIBDIR)"
	rm -f "$(DESTDIR)$(BINDIR)/diskseqfs" "$(DESTDIR)$(SBINDIR)/mount.fuse.diskseqfs"

clean:
	rm -rf dist native/build .tap

.DELETE_ON_ERROR:
.PHONY: build setup run check check-types bench install uninstall clean
