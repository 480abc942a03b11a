// The loops for any machine.
#include "cpu/machines/outside.h"

#define LC_MACHINE baseline
#include "cpu/masked_run.h"
#include "cpu/rectify_run.h"
