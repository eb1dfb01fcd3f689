// Linked together with the archive of the C++ library. That library reads a variable of glibc 2.32 to learn
// whether the process has one thread, and then counts references without atomic operations. Older systems
// do not have the variable, and could not load the module. This one says that there may be several threads.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
