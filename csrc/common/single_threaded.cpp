// SPDX-License-Identifier: Apache-2.0
// libstdc++'s shared_ptr reads this variable of glibc 2.32. One of our own, which always says
// "maybe threads", lets the library load into glibc 2.28 too.
extern "C" char __libc_single_threaded;
char __libc_single_threaded = 0;
