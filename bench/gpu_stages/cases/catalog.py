"""Every kernel that the check runs, in the order of KERNELS: attention first."""

from gpu_stages.cases import (
    attention_cases,
    element_cases,
    matmul_cases,
    mixture_cases,
    page_cases,
    sampling_cases,
)

TIMED = (
    *attention_cases.CASES,
    *element_cases.CASES,
    *page_cases.CASES,
    *matmul_cases.CASES,
    *mixture_cases.CASES,
    *sampling_cases.CASES,
)
CHECKED = (*attention_cases.CHECKED, *matmul_cases.CHECKED, *TIMED)
