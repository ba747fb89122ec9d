/* Hides AVX-512, VNNI and AMX from a process: preloaded, it makes the CPUID instruction fault and emulates it.
 *
 * The kernel can make CPUID fault (arch_prctl(2), ARCH_SET_CPUID) on CPUs with `cpuid_fault` in /proc/cpuinfo. execve(2)
 * clears the setting; the library sets it again when it is loaded into the new program.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_SET_CPUID 0x1012

typedef int (*sigaction_t)(int, const struct sigaction *, struct sigaction *);

static struct sigaction program_action; /* the program's own action on SIGSEGV */

static sigaction_t real_sigaction(void) {
  static sigaction_t function;
  if (!function) function = (sigaction_t)dlsym(RTLD_NEXT, "sigaction");
  return function;
}

/* Store the handlers of SIGSEGV that the program sets (Python's faulthandler), but do not install them over on_fault. */
int sigaction(int signal, const struct sigaction *action, struct sigaction *before) {
  if (signal != SIGSEGV || !action) return real_sigaction()(signal, action, before);
  if (before) *before = program_action;
  program_action = *action;
  return 0;
}

static int allow_cpuid(long allowed) { return (int)syscall(SYS_arch_prctl, ARCH_SET_CPUID, allowed); }

static void on_fault(int signal, siginfo_t *info, void *raw) {
  greg_t *registers = ((ucontext_t *)raw)->uc_mcontext.gregs;
  const uint8_t *code = (const uint8_t *)registers[REG_RIP];
  (void)signal;
  if (info->si_code != SI_KERNEL || code[0] != 0x0f || code[1] != 0xa2) {
    real_sigaction()(SIGSEGV, &program_action, NULL); /* not CPUID: the instruction faults again, in the program's handler */
    if (info->si_code <= 0) raise(SIGSEGV);   /* a signal sent by kill(2) does not come again */
    return;
  }
  uint32_t leaf = (uint32_t)registers[REG_RAX], subleaf = (uint32_t)registers[REG_RCX];
  uint32_t a = leaf, b, c = subleaf, d;
  allow_cpuid(1);
  __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  allow_cpuid(0);
  if (leaf == 7 && subleaf == 0) { /* Intel SDM, volume 2, CPUID: structured extended features */
    b &= ~(1u << 16 | 1u << 17 | 1u << 21 | 1u << 26 | 1u << 27 | 1u << 28 | 1u << 30 | 1u << 31);
    c &= ~(1u << 1 | 1u << 6 | 1u << 11 | 1u << 12 | 1u << 14);
    d &= ~(1u << 2 | 1u << 3 | 1u << 8 | 1u << 22 | 1u << 23 | 1u << 24 | 1u << 25);
  }
  if (leaf == 7 && subleaf == 1) {
    a &= ~(1u << 4 | 1u << 5 | 1u << 21 | 1u << 23);
    d = 0;
  }
  registers[REG_RAX] = a;
  registers[REG_RBX] = b;
  registers[REG_RCX] = c;
  registers[REG_RDX] = d;
  registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void start(void) {
  struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER};
  real_sigaction()(SIGSEGV, &action, &program_action);
  if (allow_cpuid(0) != 0) {
    perror("this kernel or CPU cannot make CPUID fault");
    _exit(3);
  }
}
