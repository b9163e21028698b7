// SPDX-License-Identifier: Apache-2.0
/*
 * getsockopt_cost FD LEVEL OPTION SIZE CALLS: ns per getsockopt() of an
 * inherited socket.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

int main(int argc, char **argv)
{
	char buffer[1024];
	int fd, level, option, size, calls;
	uint64_t begun;

	if (argc != 6)
		return 2;
	fd = atoi(argv[1]);
	level = atoi(argv[2]);
	option = atoi(argv[3]);
	size = atoi(argv[4]);
	calls = atoi(argv[5]);
	if (size > (int)sizeof(buffer) || calls < 1)
		return 2;
	begun = now_ns();
	for (int i = 0; i < calls; i++) {
		socklen_t length = size;

		if (getsockopt(fd, level, option, buffer, &length)) {
			perror("getsockopt");
			return 1;
		}
	}
	printf("%.1f\n", (double)(now_ns() - begun) / calls);
	return 0;
}
