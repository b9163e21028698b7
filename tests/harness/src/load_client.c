// SPDX-License-Identifier: Apache-2.0
/*
 * Closed-loop TCP load: keeps N connections busy for some seconds and prints
 * one line of JSON.
 *
 *   load_client HOST PORT connect N SECONDS SIZE
 *       each connection sends SIZE bytes, reads them back, closes; a new one
 *       takes its place. Latency: connect() called to last byte read.
 *   load_client HOST PORT echo N SECONDS SIZE
 *       N lasting connections send SIZE bytes and read them back in turn.
 *       Latency: send() called to last byte read.
 *   load_client HOST PORT pull|push N SECONDS SIZE
 *       N lasting connections read, or send, as fast as they can, SIZE bytes a
 *       call. "rate" is then bytes per second, and latencies are none.
 *
 * The first tenth of the time is warm-up and not counted.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_CONNECTIONS 4096
#define MAX_SAMPLES (8 * 1000 * 1000)
#define MAX_SIZE 65536
/* connections come from several loopback addresses, so that source ports in
 * TIME_WAIT do not become what is measured */
#define SOURCES 8

struct slot {
	int fd;
	bool connecting;
	uint64_t started_ns;
	size_t got;
};

static struct slot slots[MAX_CONNECTIONS];
static uint32_t *samples; /* microseconds would hide the differences: ns, capped at 4.29 s */
static size_t sample_count;
static uint64_t done, errors, warm_until;
static char message[MAX_SIZE], sink[MAX_SIZE];
static size_t size;
static struct sockaddr_in target;
static int ep;
static bool lasting, pull, push;

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static int by_value(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return (x > y) - (x < y);
}

static void count(struct slot *s)
{
	uint64_t now = now_ns(), took = now - s->started_ns;

	if (now < warm_until)
		return;
	done++;
	if (sample_count < MAX_SAMPLES)
		samples[sample_count++] = took > UINT32_MAX ? UINT32_MAX : took;
}

static void open_slot(struct slot *s)
{
	static unsigned source;
	struct sockaddr_in from = { .sin_family = AF_INET };
	struct epoll_event event = { .events = EPOLLOUT, .data.ptr = s };
	int one = 1;

	for (int tries = 0;; tries++) {
		s->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
		if (s->fd < 0) {
			perror("socket");
			exit(1);
		}
		setsockopt(s->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
		setsockopt(s->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof(one));
		from.sin_addr.s_addr = htonl(INADDR_LOOPBACK + 1 + source++ % SOURCES);
		if (bind(s->fd, (void *)&from, sizeof(from))) {
			perror("bind");
			exit(1);
		}
		s->started_ns = now_ns();
		s->got = 0;
		s->connecting = true;
		if (!connect(s->fd, (void *)&target, sizeof(target)) || errno == EINPROGRESS)
			break;
		close(s->fd);
		errors++;
		if (tries > 100) {
			perror("connect");
			exit(1);
		}
		usleep(1000);
	}
	epoll_ctl(ep, EPOLL_CTL_ADD, s->fd, &event);
}

static void send_message(struct slot *s)
{
	s->got = 0;
	if (lasting)
		s->started_ns = now_ns();
	if (send(s->fd, message, size, MSG_NOSIGNAL) != (ssize_t)size)
		errors++; /* the answer will not come; the read side sees the end */
}

/* one turn of a stream; false when it ended */
static bool stream(struct slot *s)
{
	for (int n = 0; n < 16; n++) {
		ssize_t moved = push ? send(s->fd, message, size, MSG_NOSIGNAL) : recv(s->fd, sink, size, 0);

		if (moved < 0)
			return errno == EAGAIN || errno == EINTR;
		if (!moved)
			return false;
		if (now_ns() >= warm_until)
			done += moved;
	}
	return true;
}

static void again(struct slot *s, bool failed)
{
	if (failed)
		errors++;
	close(s->fd);
	open_slot(s);
}

static void ready(struct slot *s)
{
	ssize_t got;

	if (s->connecting) {
		struct epoll_event event = { .events = EPOLLIN, .data.ptr = s };
		socklen_t length = sizeof(int);
		int failure = 0;

		getsockopt(s->fd, SOL_SOCKET, SO_ERROR, &failure, &length);
		if (failure) {
			again(s, true);
			return;
		}
		s->connecting = false;
		if (push)
			return; /* stays writable */
		epoll_ctl(ep, EPOLL_CTL_MOD, s->fd, &event);
		if (!pull)
			send_message(s);
		return;
	}
	if (pull || push) {
		if (!stream(s))
			again(s, true);
		return;
	}
	got = recv(s->fd, sink, sizeof(sink), 0);
	if (got < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (got <= 0) {
		again(s, true);
		return;
	}
	s->got += got;
	if (s->got < size)
		return;
	count(s);
	if (lasting)
		send_message(s);
	else
		again(s, false);
}

int main(int argc, char **argv)
{
	struct epoll_event events[256];
	uint64_t begun, end;
	double seconds, counted;
	int n;

	if (argc != 7)
		return 2;
	target.sin_family = AF_INET;
	inet_pton(AF_INET, argv[1], &target.sin_addr);
	target.sin_port = htons(atoi(argv[2]));
	lasting = !strcmp(argv[3], "echo");
	pull = !strcmp(argv[3], "pull");
	push = !strcmp(argv[3], "push");
	n = atoi(argv[4]);
	seconds = atof(argv[5]);
	size = atoi(argv[6]);
	if (n < 1 || n > MAX_CONNECTIONS || size < 1 || size > MAX_SIZE)
		return 2;
	memset(message, 'm', sizeof(message));
	samples = malloc(MAX_SAMPLES * sizeof(*samples));
	ep = epoll_create1(0);
	begun = now_ns();
	warm_until = begun + seconds * 1e8;
	end = begun + seconds * 1e9;
	for (int i = 0; i < n; i++)
		open_slot(&slots[i]);
	while (now_ns() < end) {
		int ready_count = epoll_wait(ep, events, 256, 100);

		for (int i = 0; i < ready_count; i++)
			ready(events[i].data.ptr);
	}
	counted = (now_ns() - warm_until) / 1e9;
	qsort(samples, sample_count, sizeof(*samples), by_value);
#define PART(p) (sample_count ? samples[(size_t)((sample_count - 1) * (p))] : 0)
	printf("{\"count\": %llu, \"errors\": %llu, \"seconds\": %.3f, \"rate\": %.1f, "
	       "\"p50_ns\": %u, \"p90_ns\": %u, \"p99_ns\": %u, \"max_ns\": %u}\n",
	       (unsigned long long)done, (unsigned long long)errors, counted, done / counted,
	       PART(0.50), PART(0.90), PART(0.99), PART(1.0));
	return 0;
}
