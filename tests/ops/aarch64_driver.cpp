// Runs one kernel of the CPU library: driver LIBRARY FUNCTION INPUT OUTPUT.
// INPUT holds int64 numbers: how many sizes, the sizes, instruction set, how many buffers, and for each buffer its bytes
// (-1: a null pointer) followed by its content. OUTPUT gets the buffers' content after the call.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

static int64_t number(FILE* file) {
  int64_t value;
  if (fread(&value, 8, 1, file) != 1) exit(3);
  return value;
}

int main(int, char** argv) {
  void* library = dlopen(argv[1], RTLD_NOW);
  if (!library) return fprintf(stderr, "%s\n", dlerror()), 1;
  void* function = dlsym(library, argv[2]);
  if (!function) return fprintf(stderr, "no %s\n", argv[2]), 2;
  FILE* in = fopen(argv[3], "rb");
  std::vector<int64_t> sizes(number(in));
  for (auto& size : sizes) size = number(in);
  const int64_t isa = number(in);
  std::vector<std::vector<char>> buffers(number(in));
  void* p[12] = {};
  for (size_t i = 0; i < buffers.size(); ++i) {
    const int64_t bytes = number(in);
    if (bytes < 0) continue;
    buffers[i].resize(bytes);
    if (bytes && fread(buffers[i].data(), 1, bytes, in) != size_t(bytes)) return 3;
    p[i] = buffers[i].data();
  }
  using Kernel = void (*)(const int64_t*, int64_t, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*,
                          void*, void*);
  reinterpret_cast<Kernel>(function)(sizes.data(), isa, p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9],
                                     p[10], p[11]);
  FILE* out = fopen(argv[4], "wb");
  for (auto& buffer : buffers) fwrite(buffer.data(), 1, buffer.size(), out);
  return fclose(out);
}
