{
  "targets": [
    {
      "target_name": "diskseqfs_native",
      "sources": [
        "addon/addon.cc",
        "addon/blockdev.cc",
        "addon/constants.cc",
        "addon/descriptor.cc",
        "addon/devmapper.cc",
        "addon/inotify.cc",
        "addon/links.cc",
        "addon/loop.cc",
        "addon/memory.cc",
        "addon/mount.cc",
        "addon/poll.cc",
        "addon/sockets.cc",
        "addon/tasks.cc",
        "addon/threads.cc",
        "addon/uevent.cc"
      ],
      "include_dirs": [
        "<!@(node -p \"require('node-addon-api').include_dir\")"
      ],
      "defines": [
        "NAPI_VERSION=8",
        "NAPI_DISABLE_CPP_EXCEPTIONS",
        # In a worker that is being ended, no JavaScript can be called. That is no reason to end the process.
        "NODE_API_SWALLOW_UNTHROWABLE_EXCEPTIONS",
        "_FILE_OFFSET_BITS=64"
      ],
      "cflags_cc": [
        "-std=c++17",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Wno-unused-parameter"
      ]
    }
  ]
}
