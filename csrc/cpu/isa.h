// Instruction sets. Every kernel file is compiled once for each of them, in a namespace of its own
// (XCOS_ISA), with no function that the linker could share between them; the caller's entry point picks one
// at run time.
#pragma once

namespace xcos::cpu {

// avx512vnni: 16-bit fixed-point dot products and bfloat16 ones, as Zen 4, Sapphire Rapids and later have
// both; and, in xcos_head, the matrix unit AMX where the processor has it and the system grants it.
enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2, avx512vnni = 3 };

// The best set that both this build and this processor have; the environment variable XCOS_CPU_ISA (baseline,
// avx2, avx512, avx512vnni) lowers it. Read once. Throws std::invalid_argument when the variable names an
// unknown or unavailable set.
Isa selected_isa();

const char* isa_name(Isa isa);

// Whether kernels for this set were compiled into the library.
bool isa_compiled(Isa isa);

// Whether this processor can run them.
bool isa_supported(Isa isa);

}  // namespace xcos::cpu

// Weak: null where a build leaves the set out (CMakeLists.txt, XCOS_CPU_ISAS).
#define XCOS_CPU_KERNEL_OF(isa, name, parameters) \
  namespace isa {                                 \
  __attribute__((weak)) void name parameters;     \
  }
#if defined(XCOS_HAVE_X86_ISAS)
#define XCOS_CPU_KERNEL(name, parameters)          \
  XCOS_CPU_KERNEL_OF(baseline, name, parameters)   \
  XCOS_CPU_KERNEL_OF(avx2, name, parameters)       \
  XCOS_CPU_KERNEL_OF(avx512, name, parameters)     \
  XCOS_CPU_KERNEL_OF(avx512vnni, name, parameters) \
  void name parameters;
#else
#define XCOS_CPU_KERNEL(name, parameters)        \
  XCOS_CPU_KERNEL_OF(baseline, name, parameters) \
  void name parameters;
#endif
