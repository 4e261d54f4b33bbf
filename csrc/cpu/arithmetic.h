// The floating-point environment of a thread, for code outside of the loops: this includes nothing of an instruction
// set.
#pragma once

#ifdef __x86_64__
#include <xmmintrin.h>
#else
#include <cfenv>
#endif

namespace qatfast::cpu {

// While it lives, this thread rounds half to even, keeps subnormal numbers and traps nothing, whatever the user or
// another library has set (fesetround, feenableexcept, torch.set_flush_denormal). The destructor restores the
// environment. Each thread has one of its own, so that every task of a parallel loop needs this. It costs 1 ns if
// nothing is set.
class StandardArithmetic {
 public:
  StandardArithmetic(const StandardArithmetic&) = delete;
  StandardArithmetic& operator=(const StandardArithmetic&) = delete;

#ifdef __x86_64__
  StandardArithmetic() : before_(_mm_getcsr()), is_changed_((before_ & ~flags) != standard) {
    if (is_changed_) {
      set(standard);
    }
  }
  ~StandardArithmetic() {
    if (is_changed_) {
      set(before_);
    }
  }

 private:
  static constexpr unsigned flags = 0x3F;      // exceptions that were raised
  static constexpr unsigned standard = 0x1F80; // all exceptions masked, to nearest, no flushing

  static void set(unsigned state) {
    asm volatile("" ::: "memory"); // the compiler moves no memory access, and so no arithmetic on its value, past this
    _mm_setcsr(state);
    asm volatile("" ::: "memory");
  }

  const unsigned before_;
  const bool is_changed_;
#else
  StandardArithmetic() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~StandardArithmetic() {
    std::fesetenv(&before_);
  }

 private:
  std::fenv_t before_;
#endif
};

} // namespace qatfast::cpu
