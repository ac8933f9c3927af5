// SPDX-License-Identifier: MIT
// With --require: loop devices are bound without LO_FLAGS_AUTOCLEAR. A twin.
'use strict'
require('../../native/build/Release/diskseqfs_native.node').LO_FLAGS_AUTOCLEAR = 0
