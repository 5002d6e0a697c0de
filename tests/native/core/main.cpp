// core_tests [--small] tests the CPU core without torch, for the sanitizers. SIMPLEXFIX_ISA selects the kernels.
#include <cstring>

#include "core.h"

int main(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--small") != 0) {
      std::printf("unknown option %s\n", argv[i]);
      return 2;
    }
    options.small = true;
  }
  test_parallel(options);
  test_search(options);
  test_index(options);
  test_losses(options);
  std::printf("%s %s: %d cases, %d failures\n", g_failures ? "FAILED" : "OK", simplexfix::cpu::isa(), g_cases,
              g_failures);
  return g_failures != 0;
}
