# CUDA is compiled where a toolkit is found, whether or not a GPU is visible. Sets XCOS_CUDA_{SOURCES,DEFINITIONS,
# LIBRARIES,SUMMARY}.
set(XCOS_CUDA_SOURCES)
set(XCOS_CUDA_DEFINITIONS)
set(XCOS_CUDA_LIBRARIES)

string(TOLOWER "${XCOS_CUDA}" xcos_cuda)
if(NOT xcos_cuda MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "XCOS_CUDA: expected auto, on or off, got '${XCOS_CUDA}'")
endif()
if(xcos_cuda STREQUAL "off")
  set(XCOS_CUDA_SUMMARY "off (XCOS_CUDA=off)")
  return()
endif()

# What check_language needs to know before it tries to compile: a list that every toolkit from 12.8 has.
if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80)
endif()
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(xcos_cuda STREQUAL "on")
    message(FATAL_ERROR "XCOS_CUDA=on, but no working nvcc was found (set CUDACXX to its path)")
  endif()
  set(XCOS_CUDA_SUMMARY "none (no nvcc found)")
  return()
endif()

set(wanted "${XCOS_CUDA_ARCHITECTURES}")
if(wanted STREQUAL "release")
  set(wanted "75-real;80-real;86-real;89-real;90-real;100-real;120")
elseif(wanted STREQUAL "")
  # The visible GPU's architecture, asked of the driver's tool; never a reason to fail.
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
                  OUTPUT_VARIABLE visible ERROR_QUIET RESULT_VARIABLE status OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(status EQUAL 0 AND visible MATCHES "^[0-9]+\\.[0-9]+")
    string(REPLACE "\n" ";" visible "${visible}")
    list(TRANSFORM visible STRIP)
    list(TRANSFORM visible REPLACE "\\." "")
    list(REMOVE_DUPLICATES visible)
    list(TRANSFORM visible APPEND "-real")
    set(wanted "${visible}")
  else()
    # Turing, Ampere and Ada, Hopper; newer ones compile the PTX of 90 at first use.
    set(wanted "75-real;80-real;90")
  endif()
endif()

set(CMAKE_CUDA_ARCHITECTURES "${wanted}")
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
find_package(CUDAToolkit REQUIRED)

set(XCOS_CUDA_SOURCES csrc/cuda/runtime.cu csrc/cuda/grid_cosine.cu csrc/cuda/grid_match.cu
    csrc/cuda/xcos_head.cu csrc/cuda/xcos_score.cu csrc/cuda/xcos_score_backward.cu csrc/cuda/xcos_matrix.cu
    csrc/cuda/xcos_matrix_mma.cu csrc/cuda/xcos_matrix_backward.cu csrc/cuda/xcos_topk.cu)
set(XCOS_CUDA_LIBRARIES CUDA::cudart_static)
string(REPLACE ";" " " architectures "${wanted}")
set(XCOS_CUDA_DEFINITIONS XCOS_WITH_CUDA XCOS_CUDA_COMPILER="nvcc ${CMAKE_CUDA_COMPILER_VERSION}"
    XCOS_CUDA_ARCHITECTURES="${architectures}")
set(XCOS_CUDA_SUMMARY "${CMAKE_CUDA_COMPILER_VERSION} for ${architectures}")
