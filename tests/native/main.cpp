// kernel_tests [--order forward|reverse|random] [--small] [--ptx] [--dtype NAME]... [--only PART]
// Exit status 0: all passed; 1: wrong results; 2: unknown option; 3: the emulator aborted a launch.
#include <cstdio>
#include <cstring>
#include <exception>

#include "check.h"
#include "tests.h"

int main(int argc, char** argv) {
  Selection selection;
  std::string only;
  bool ptx = false;
  const auto orders = {emulator::Order::kForward, emulator::Order::kReverse, emulator::Order::kRandom};
  std::vector<emulator::Order> chosen(orders);
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i], value = i + 1 < argc ? argv[i + 1] : "";
    if (option == "--small") {
      selection.small = true;
    } else if (option == "--ptx") {
      ptx = true;
    } else if (option == "--dtype" && ++i < argc) {
      selection.dtypes.push_back(value);
    } else if (option == "--only" && ++i < argc) {
      only = value;
    } else if (option == "--order" && ++i < argc && (value == "forward" || value == "reverse" || value == "random")) {
      chosen = {*(orders.begin() + (value == "forward" ? 0 : value == "reverse" ? 1 : 2))};
    } else {
      std::printf("unknown option %s %s\n", argv[i], value.c_str());
      return 2;
    }
  }
  try {
    if (only.empty() || only == "emulator") test_emulator();
    for (const emulator::Order order : chosen) {
      emulator::g_settings = {order, 1};
      emulator::g_launches = emulator::g_ptx_launches = 0;
      if (only.empty() || only == "primitives") test_primitives(selection);
      if (only.empty() || only == "cross_entropy") test_cross_entropy(selection);
      if (only.empty() || only == "contrast") test_contrast(selection);
      if (only.empty() || only == "logits") test_logits(selection);
      if (only.empty() || only == "scale_rows") test_scale_rows(selection);
      if (only.empty() || only == "topk") test_topk(selection);
      // With --ptx every launch must run translated PTX, without it none.
      if (emulator::g_ptx_launches != (ptx ? emulator::g_launches : 0))
        failed("%lld of %lld launches ran translated PTX", (long long)emulator::g_ptx_launches,
               (long long)emulator::g_launches);
    }
  } catch (const std::exception& error) {
    std::printf("CAUGHT %s\n", error.what());
    return 3;
  }
  std::printf("%s: %d cases, %d failures\n", g_failures ? "FAILED" : "OK", g_cases, g_failures);
  return g_failures != 0;
}
