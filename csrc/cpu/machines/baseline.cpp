// The loops of rectify_run.h for any machine.
#include "cpu/machines/outside.h"

#define LC_MACHINE baseline
#include "cpu/rectify_run.h"
