{
  "targets": [
    {
      "target_name": "diskseqfs_native",
      "sources": [
        "addon.cc",
        "blockdev.cc",
        "constants.cc",
        "descriptor.cc",
        "inotify.cc",
        "links.cc",
        "memory.cc",
        "mount.cc",
        "poll.cc",
        "sockets.cc",
        "tasks.cc",
        "threads.cc",
        "uevent.cc"
      ],
      "include_dirs": [
        "<!@(node -p \"require('node-addon-api').include_dir\")"
      ],
      "defines": [
        "NAPI_VERSION=8",
        "NAPI_DISABLE_CPP_EXCEPTIONS",
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
