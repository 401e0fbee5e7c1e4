// Switching between stacks: a few instructions where it is written by hand, else ucontext.
#pragma once

#include <stddef.h>
#include <string.h>

#ifdef CUDA_ON_CPU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define WITH_ASAN 1
#else
#define WITH_ASAN 0
#endif

#if defined(__x86_64__) && !defined(CUDA_ON_CPU_UCONTEXT)
// Saves what a callee must keep, leaves the stack pointer in *from, goes on at to.
asm(R"(
.text
.p2align 4
.hidden cuda_on_cpu_switch
.globl cuda_on_cpu_switch
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#define SAVED_WORDS 6
#elif defined(__aarch64__) && !defined(CUDA_ON_CPU_UCONTEXT)
asm(R"(
.text
.p2align 4
.hidden cuda_on_cpu_switch
.globl cuda_on_cpu_switch
cuda_on_cpu_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
#else
#include <ucontext.h>
#define WITH_UCONTEXT 1
#endif
#ifndef WITH_UCONTEXT
#define WITH_UCONTEXT 0
extern "C" void cuda_on_cpu_switch(void** from, void* to);
#endif

struct Context {
#if WITH_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
  char* stack = nullptr;  // its lowest address; the main context's is asked of ASan
  size_t stack_size = 0;
  void* fake_stack = nullptr;
};

static Context main_context;
static Context* running;

static void arrived() {
#if WITH_ASAN
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(running->fake_stack, &bottom, &size);
  if (main_context.stack == nullptr) {  // the first fiber came from the main stack
    main_context.stack = (char*)bottom;
    main_context.stack_size = size;
  }
#endif
}

static void switch_to(Context& to, bool forever = false) {
  Context& from = *running;
  running = &to;
#if WITH_ASAN
  __sanitizer_start_switch_fiber(forever ? nullptr : &from.fake_stack, to.stack, to.stack_size);
#else
  (void)forever;
#endif
#if WITH_UCONTEXT
  swapcontext(&from.context, &to.context);
#else
  cuda_on_cpu_switch(&from.stack_pointer, to.stack_pointer);
#endif
  arrived();
}

static void enter(Context& context, void (*function)()) {
#if WITH_UCONTEXT
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = context.stack;
  context.context.uc_stack.ss_size = context.stack_size;
  context.context.uc_link = nullptr;
  makecontext(&context.context, function, 0);
#else
  void** top = (void**)(context.stack + context.stack_size - 64);
#if defined(__x86_64__) && !defined(CUDA_ON_CPU_UCONTEXT)
  // ret leaves the stack as after a call: 8 bytes off a multiple of 16.
  *--top = nullptr;
  *--top = (void*)function;
  top -= SAVED_WORDS;
  memset(top, 0, SAVED_WORDS * sizeof(void*));
#else
  top -= 20;
  memset(top, 0, 160);
  top[11] = (void*)function;  // x30
#endif
  context.stack_pointer = top;
#endif
}
