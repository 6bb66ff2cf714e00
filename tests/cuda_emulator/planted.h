// Faults planted on purpose: the emulator has to stop at every one of them, a GPU's sanitizers at some.
#pragma once

#include <string>
#include <vector>

std::vector<std::string> planted_names();

// Runs one; returns when it came to its end undetected.
void run_planted(const std::string& name);
