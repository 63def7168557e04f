# Sets cpu_isas, the instruction sets that the CPU kernels are compiled for, from the setting FUSED_ATTN_CPU_ISAS:
#
#   auto       the baseline, which every machine can run, and the best instruction set of this machine
#   runnable   those that this machine can run
#   all        those that the compiler knows (known_isas)
#   a list     these and the baseline; names are separated by commas
#
# The kernels of one instruction set take half a minute to compile, and a machine uses those of its best one alone. The
# avx512_bf16 and amx kernels are for bfloat16 only, so they need the avx512 kernels beside them.

string(REPLACE "," ";" wanted_isas "${FUSED_ATTN_CPU_ISAS}")
if(FUSED_ATTN_CPU_ISAS MATCHES "^(auto|runnable)$")
  set(runnable_isas "${known_isas}") # of another machine, nothing is known
  if(NOT CMAKE_CROSSCOMPILING)
    list(TRANSFORM known_defines PREPEND -D OUTPUT_VARIABLE flags)
    try_run(status compiles "${CMAKE_BINARY_DIR}/print_isas" "${CMAKE_CURRENT_LIST_DIR}/print_isas.cpp"
      COMPILE_DEFINITIONS ${flags}
      RUN_OUTPUT_VARIABLE printed
      COMPILE_OUTPUT_VARIABLE errors)
    if(NOT compiles OR NOT status EQUAL 0)
      message(FATAL_ERROR "fused_attn: cmake/print_isas.cpp does not run: ${errors}${printed}")
    endif()
    set(runnable_isas "${printed}")
  endif()
  set(wanted_isas "${runnable_isas}")
  if(FUSED_ATTN_CPU_ISAS STREQUAL "auto")
    list(GET wanted_isas -1 wanted_isas)
  endif()
elseif(FUSED_ATTN_CPU_ISAS STREQUAL "all")
  set(wanted_isas "${known_isas}")
endif()

foreach(isa IN LISTS wanted_isas)
  if(NOT isa IN_LIST known_isas)
    list(JOIN known_isas ", " names)
    message(FATAL_ERROR "fused_attn: FUSED_ATTN_CPU_ISAS: expected auto, runnable, all or a list of ${names}, got "
      "${FUSED_ATTN_CPU_ISAS}")
  endif()
endforeach()
list(APPEND wanted_isas baseline)
if(avx512_bf16 IN_LIST wanted_isas OR amx IN_LIST wanted_isas)
  list(APPEND wanted_isas avx512)
endif()
set(cpu_isas "")
foreach(isa IN LISTS known_isas) # in the order of the kernels
  if(isa IN_LIST wanted_isas)
    list(APPEND cpu_isas ${isa})
  endif()
endforeach()
