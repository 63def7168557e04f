# Sets `kernels`, the object files of the CUDA kernels, and `kernel_architectures`, a text that names what they are for.

# The kernels for 80 contain PTX, too, from which drivers make code for later GPUs.
set(host_architectures "")
set(kernel_architectures "")
if(80 IN_LIST cuda_architectures)
  list(APPEND host_architectures 80)
  list(APPEND kernel_architectures 80)
endif()
if(90 IN_LIST cuda_architectures)
  list(APPEND host_architectures 90-real)
  list(APPEND kernel_architectures 90a-real)
endif()
list(JOIN kernel_architectures "," kernel_architectures)
message(STATUS "fused_attn: CUDA kernels for ${kernel_architectures}, by nvcc ${CMAKE_CUDA_COMPILER_VERSION}")

# The Python that isolated environments link to. Their own path may be a new one every time, as with `python -m build`,
# which would make every build compile the kernels again.
file(REAL_PATH "${Python_EXECUTABLE}" lasting_python)

# Runs nvcc, and judges what ptxas says about spills and the like.
set(launcher "${lasting_python}" "${PROJECT_SOURCE_DIR}/cmake/checked_nvcc.py"
  "${CMAKE_CUDA_COMPILER_VERSION}" "${FUSED_ATTN_FAIL_ON_SPILLS}")

# add_kernels(NAME ARCHITECTURES SOURCES...)
function(add_kernels name architectures)
  add_library(${name} OBJECT ${ARGN})
  target_include_directories(${name} PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}")
  set_target_properties(${name} PROPERTIES
    CUDA_ARCHITECTURES "${architectures}"
    CUDA_STANDARD 17
    CUDA_STANDARD_REQUIRED ON
    CUDA_COMPILER_LAUNCHER "${launcher}"
    CUDA_VISIBILITY_PRESET hidden
    POSITION_INDEPENDENT_CODE ON)
endfunction()

# The largest files first: ninja starts files in this order, and one that starts last would keep one core busy alone.
set(kernels "")
if(90 IN_LIST cuda_architectures)
  file(GLOB sm90_kernels CONFIGURE_DEPENDS cuda/sm90/*.cu)
  add_kernels(cuda_sm90 90a-real ${sm90_kernels})
  list(APPEND kernels $<TARGET_OBJECTS:cuda_sm90>)
else()
  set_property(SOURCE cuda/attention.cu APPEND PROPERTY COMPILE_DEFINITIONS FUSED_ATTN_WITHOUT_SM90)
endif()
if(80 IN_LIST cuda_architectures)
  file(GLOB sm80_kernels CONFIGURE_DEPENDS cuda/sm80/*.cu)
  add_kernels(cuda_sm80 80 ${sm80_kernels})
  list(APPEND kernels $<TARGET_OBJECTS:cuda_sm80>)
else()
  set_property(SOURCE cuda/attention.cu APPEND PROPERTY COMPILE_DEFINITIONS FUSED_ATTN_WITHOUT_SM80)
endif()

# In these small files, the headers take half of the time. So the files of the folder are compiled as one.
file(GLOB host_kernels CONFIGURE_DEPENDS cuda/*.cu)
file(GLOB sources CONFIGURE_DEPENDS cuda/decode/*.cu)
list(TRANSFORM sources REPLACE "(.+)" "#include \"\\1\"\n")
list(JOIN sources "" text)
set(joined "${CMAKE_CURRENT_BINARY_DIR}/decode.cu")
# A file that is the same is not written again, because ninja would compile it again. file(CONFIGURE) would do so, too,
# but it would also replace what stands between two @ in a path.
set(written "")
if(EXISTS "${joined}")
  file(READ "${joined}" written)
endif()
if(NOT "${written}" STREQUAL "${text}")
  file(WRITE "${joined}" "${text}")
endif()
list(PREPEND host_kernels "${joined}")
add_kernels(cuda_host "${host_architectures}" ${host_kernels})
list(APPEND kernels $<TARGET_OBJECTS:cuda_host>)
